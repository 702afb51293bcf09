"""Methods that vLLM serves, each in a separate process.

escapes  counts activation codes that carry 8 bits
served   calibrates a checkpoint, and runs the worker
worker   one vLLM engine and its results
"""
