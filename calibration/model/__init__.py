"""The source model: its files, its decoder, and the layers that will be quantized.

source         config.json and the tensors of the safetensors files
fp8            FP8 weights as 16 bit
architectures  the known architectures: decoder blocks, linears that share an input, towers
refusals       faults that are seen before any work: leftovers in config.json, other heads and names
plan           which linears are quantized and how: the checkpoint's quantization_config
loading        loads the modules before the decoder blocks, and the blocks one at a time
"""
