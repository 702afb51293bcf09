"""Offline tools for the GPU kernels. Nothing that serves imports them.

autotune          measures tiles on this machine's GPU and writes a tile table
autotune_int8     the part of it that measures the int8 path
targets           the GPUs that kernels are compiled for without one at hand
aot_compile       compiles quantizers and products for them
aot_experts       compiles the kernels of routed experts for them
aot_int8          compiles the int8 path and the 8-bit head for them
binary_resources  registers, shared memory and instructions of a compiled kernel
binary_checks     conditions that a compiled kernel meets before it is shipped
occupancy         programs of a kernel that one multiprocessor holds at a time
no_device         a driver for Triton that launches nothing, to measure the host's cost of a call
timing            times of layers inside a CUDA graph, with weights outside the cache
"""
