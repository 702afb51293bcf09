"""MorphoQuant for vLLM: 4-bit weights and 4-bit static activations for omni-modal models.

    format       the checkpoint as files (torch and safetensors only)
    numerics     the one definition of the numbers (torch only)
    ops          the operators that the plugin calls, and the choice of a backend
    cpu, gpu     the backends
    plugin       what vLLM calls; the only room that imports vLLM
    hf           loading a checkpoint with transformers
    compat       command: whether the vLLM at hand has the interfaces that the plugin needs
    handles      layers that are bound to a backend, found by a tensor of theirs
    host_memory  gives freed memory back, large pages
    environment  the environment variables that are read
    errors       the one error type for what a user can mend

Importing this package imports nothing else.
"""

__version__ = "0.1.0"
