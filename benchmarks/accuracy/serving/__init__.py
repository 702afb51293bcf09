"""Methods that vLLM serves, each in a separate process.

escapes    counts activation codes that carry 8 bits
objective  the threshold of a mask that is one number for the whole network
served     calibrates a checkpoint, and runs the worker
worker     one vLLM engine and its results
"""
