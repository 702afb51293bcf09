"""The facts of this machine that decide how a model is served. `morphoquant doctor` prints them.

finding   one fact, its state and its remedy
machine   Python, processor, kernels, compiler, GPU, cache
server    vLLM, its interfaces, the plugin, libraries for media
mends     command: finds and mends an environment in which vLLM cannot serve; `make setup` calls it
torchvision_ops_hook  a file that a mend copies into the environment
memory    a checkpoint's need against this machine's memory
examine   all checks in order, and their display
"""
