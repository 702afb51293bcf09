"""`python -m benchmarks.accuracy`: the accuracy of 4-bit methods, on a real language model and on an omni model."""
