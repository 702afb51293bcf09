"""Methods that vLLM serves, in a process of their own.

escapes  counts activation codes that carry 8 bits
served   calibrates a checkpoint, and runs the worker
worker   one vLLM engine and its results
"""
