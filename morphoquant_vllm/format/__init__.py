"""The checkpoint as files: names, shapes, dtypes and rules. Needs torch and safetensors only.

layers       settings of a linear and of a list of experts, and the tensors that each stores
schema       quantization_config as a whole
kv_cache     magnitudes of a block's attention, for scales of a server's cache
integrity    a checkpoint's lists and hashes of its tensors, files and settings
beside       files beside the weights that a server reads, and whether they have changed
pooling      an embedding model's steps after its hidden states, and their folders
values       the values that a layer's tensors may hold
files        opens JSON and safetensors files, or refuses them in one line
checkpoint   reads a directory's settings, headers and tensors
verify       checks everything that the format promises
seal         adds the integrity of written files to the settings
token_table  from token ids to modality rows
"""
