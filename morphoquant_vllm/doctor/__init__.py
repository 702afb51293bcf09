"""The facts of this machine that decide how a model is served. `morphoquant doctor` prints them.

finding   one fact, its state and its remedy
machine   Python, processor, kernels, compiler, GPU, cache
server    vLLM, its interfaces, the plugin, libraries for media
memory    a checkpoint's need against this machine's memory
examine   all checks in order, and their display
"""
