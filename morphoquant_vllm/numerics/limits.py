"""Limits of a layer's weight scales: the list of group sizes and the bound of levels. Imports nothing."""

# G: input channels that share one weight scale. The CPU kernels (record.h) check for the same sizes.
GROUP_SIZES = (32, 64, 128)
# Levels of two-level scales are 1 to this. Level times weight code then lies in [-128, 112], which fits int8.
MAX_LEVEL = 16
