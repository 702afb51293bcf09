"""The backend for x86 CPUs: C++ kernels, from the wheel or compiled at first use. `kernels/` holds their source.

backend   checked calls of the compiled linear layer
experts   checked calls of the compiled routed experts
head      checked calls of the compiled heads
layout    the memory layout of a layer for the kernels
build     compiles the kernels and loads them
compiler  the machine's C++ compiler: finds and runs it
shipped   the kernels that a wheel brings
cache     the directory of built kernels: write permissions, and checks for damage
"""
