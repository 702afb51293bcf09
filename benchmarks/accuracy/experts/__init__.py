"""Mixtures of experts: each expert's linears by themselves, and the error of each expert."""
