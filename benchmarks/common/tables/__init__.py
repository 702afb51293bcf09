"""Tables that several benchmarks print.

linears  times of linears over bf16
"""
