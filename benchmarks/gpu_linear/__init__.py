"""Linear layers timed on the GPU at hand: ours beside cuBLAS and vLLM's own int4 kernels."""
