"""The source model: what its files hold, where its decoder is, what will be quantized.

source         config.json and the tensors of the safetensors files
architectures  the known architectures: decoder blocks, linears that share an input, towers
plan           which linears are quantized and how: the checkpoint's quantization_config
loading        what runs before the decoder blocks, and the blocks, one at a time
"""
