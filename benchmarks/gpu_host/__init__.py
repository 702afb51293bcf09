"""The host's cost of a call of a GPU layer, measured without a GPU: a bound layer beside launches by Triton's JIT."""
