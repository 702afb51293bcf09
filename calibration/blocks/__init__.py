"""Runs the model: the loop over blocks, and the hidden states between them.

capture         captures the decoder's inputs: embeddings and towers run once on every sample
loop            observes each block, quantizes it, passes its outputs to the next
results         what the calibration of a block made, and the warnings about it
towers          calibrates the blocks of an encoder, as loop does those of the decoder
sample_pass     runs one sample, or each of several, through one block
sensitivity     how much each linear's errors matter for the decoder's output
memory_need     the memory and disk that a run needs
time_need       the time that a run needs
replacing       the weights of the layers, and quantized modules in their places
served_linear   a quantized linear that replaces the model's linear
served_experts  quantized experts that replace the model's experts
"""
