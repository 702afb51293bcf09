"""Running the model: the loop over blocks, and what flows between them.

capture        what reaches the decoder: embeddings and towers run once on every sample
loop           observes each block, quantizes it, passes its outputs to the next
towers         the same for the blocks of an encoder
memory_need    how much memory and disk a run needs
served_linear  a quantized linear in the place of the model's own
"""
