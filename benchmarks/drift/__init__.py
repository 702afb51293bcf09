"""How far log probabilities move by how an engine is started: ranks, compilation, and the order of sums.

engine    the log probabilities of prompts, by an engine in a process of its own
residual  a simulation: what keeping values in float32 leaves of the differences
figures   the differences of two runs, and codes at a limit between two of them
"""
