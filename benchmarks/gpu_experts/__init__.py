"""Routed experts on a GPU: ours beside vLLM's in 16 bit and in 4 bit."""
