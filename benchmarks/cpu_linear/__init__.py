"""Linear layers on a CPU: this package's kernels against those that vLLM runs there."""
