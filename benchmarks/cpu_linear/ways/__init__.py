"""The ways that are compared, each a function of x.

heads  lm_head: vLLM's, and ours in 16 and in 8 bit
peers  linears: ours, and vLLM's
zen    linears: zentorch's
"""
