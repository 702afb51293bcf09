"""The methods that MorphoQuant is compared with, as pure functions on float32 tensors.

Notation: M tokens, K input channels, N output channels, G group size along K. Weights are [N, K], activations [M, K].
"""
