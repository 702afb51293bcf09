"""Routed experts on a CPU: this package's kernels against vLLM's bf16 ones."""
