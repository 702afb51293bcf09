"""Linear layers timed on the GPU of this machine: ours beside cuBLAS and vLLM's int4 kernels."""
