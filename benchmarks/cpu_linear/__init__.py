"""Linear layers on a CPU: this package's kernels against what vLLM runs there."""
