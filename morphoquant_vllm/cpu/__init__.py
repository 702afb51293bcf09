"""The backend for x86 CPUs: C++ kernels, compiled at first use. `kernels/` holds their source.

backend  checked calls of the compiled linear layer
head     checked calls of the compiled heads
layout   how a layer lies in memory for the kernels
build    compiles the kernels and loads them
cache    where built kernels are kept: who may write there, and what is intact
"""
