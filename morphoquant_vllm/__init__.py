"""MorphoQuant for vLLM: 4-bit weights and 4-bit static activations for omni-modal models.

    format         the checkpoint as files (torch and safetensors only)
    numerics       the one definition of the numbers (torch and safetensors only)
    ops            the operators that the plugin calls
    backends       the implementations of the linear layer, and which serves a device
    cpu, gpu       their code
    plugin         the classes that vLLM calls; the only room that imports vLLM
    hf             loading a checkpoint with transformers
    doctor         the facts of a machine that decide how a model is served, and mends of its environment
    compat         command: compares the installed vLLM with the interfaces that the plugin needs
    private_parts  private interfaces of torch, transformers and Triton that are used
    names          command: does vLLM find every quantized layer under its name?
    handles        bound layers by their handle, which is one of their tensors
    host_memory    large pages, and the return of freed memory
    environment    the environment variables that are read
    errors         the one error type for problems that a user can fix

Importing this package imports nothing else.
"""

__version__ = "0.1.0"
