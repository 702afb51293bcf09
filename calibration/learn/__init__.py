"""Learns what costs no serving time from the output of the model: steps, output scales and constants.

`metrics` measures before the blocks, by the same output, how errors of outputs add up.

stage       the stage of a calibration
run         one run of it: targets, updates and judgements, kept as it goes
extent      how much each effort learns, and from which samples
descent     the steps, and their judgement
model       the quantized decoder, of which one block at a time is in memory
linear      a quantized linear whose rounding lets gradients pass
head        the final norm, and the weights of the head
divergence  how far the next token is from that of the 16-bit model
targets     the next token in the 16-bit model, and the tokens that count
metrics     how errors of a linear's outputs add up in the model
changes     what was learned, and the tensors that a checkpoint then stores
need        memory and operations
"""
