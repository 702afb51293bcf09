"""Limits of a checkpoint's values: group sizes, levels, magnitudes. Imports nothing."""

# G: input channels that share one weight scale. The CPU kernels (record.h) check for the same sizes.
GROUP_SIZES = (32, 64, 128)
# Levels of two-level scales are 1 to this. Level times weight code then lies in [-128, 112], which fits int8.
MAX_LEVEL = 16
# Largest magnitude of a value and of an output's bound. The next norm squares an output, and that square is still
# finite in float32. Real layers stay below 1e6.
MAX_MAGNITUDE = 1.8e19
