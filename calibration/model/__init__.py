"""The source model: its files, its decoder, and the layers that will be quantized.

source         config.json and the tensors of the safetensors files
fp8            FP8 weights as 16 bit
architectures  the verified architectures: decoder blocks, linears that share an input, towers
refusals       faults that are seen before any work: leftovers in config.json, other heads and names
embedders      steps of an embedding model that a server would leave out or read otherwise
discovery      the generic path: the architecture of an unlisted model, by its structure
tracing        one pass of a model without weights: inputs and order of its linears
served_names   asks vLLM, in a process of its own, whether it would find the planned layers
plan           which linears are quantized and how: the checkpoint's quantization_config
ranks          among how many ranks the checkpoint can be divided
bits           the bits of each linear's weights within a `bits_budget`
head_tensor    the weights of the head in the files
experts        the routed experts of a block in the files, read one at a time
buffers        the tensors of a block that no file holds: transformers computes them
ties           tensors that config.json makes one, against those of the files
run_config     settings of a run in config.json, which say nothing of the model
loading        loads the modules before the decoder blocks
block_loader   loads the decoder blocks, one at a time
"""
