"""Whole engines: vLLM's own benchmarks over MorphoQuant and the peers that run on this machine."""
