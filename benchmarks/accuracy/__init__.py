"""`python -m benchmarks.accuracy`: what 4 bits cost, on a real language model and on an omni model."""
