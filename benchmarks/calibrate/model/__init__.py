"""Generated models in published layouts.

generate          writes one
layouts           the configs, by layout
published         the published config of the 3B model
safetensors_file  a file written one tensor at a time
tokenizer         a tokenizer with the published special ids
weights           seeded values with outliers
"""
