"""The checkpoint as files: names, shapes, dtypes and rules. Needs torch and safetensors only.

schema       quantization_config and the tensors of a layer
checkpoint   reads a directory, and says whether it obeys the format
token_table  from token ids to modality rows
"""
