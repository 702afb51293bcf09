"""Ceilings of the machine: bytes per second read from memory, byte multiply-adds per second in registers."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from morphoquant_vllm import environment
from morphoquant_vllm.cpu import build as cpu_build
from morphoquant_vllm.cpu.compiler import BuildError, find_compiler
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.host_memory import zero_bytes

# Larger than any cache of these machines.
READ_BYTES = 1 << 29
DOT_ROUNDS = 2_000_000
REPEATS = 7


def ceilings(threads: int) -> dict[str, float]:
    """Best of REPEATS: GB/s read and G multiply-adds/s ("gmac_s") with this build's dot product."""
    try:
        instructions = cpu_build.instruction_sets(cpu_build.cpu_flags(), environment.cpu_instructions())[0]
        built = cpu_build.build(
            instructions,
            find_compiler(),
            cpu_build.cache_directory(),
            cpu_build.torch_openmp(),
            ("-I", str(cpu_build.SOURCES)),
            Path(__file__).parent / "ceilings",
        )
        library = ctypes.CDLL(str(built))
    except (BuildError, OSError) as error:
        raise MorphoQuantError(f"no ceilings without the CPU kernels: {error}") from error
    library.dot_products.argtypes, library.dot_products.restype = [ctypes.c_int64] * 2, ctypes.c_double
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    # In large pages, as the kernels' records are. Written once, which gives each page separate memory.
    data = zero_bytes(READ_BYTES).fill_(1)
    read, dots = [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        library.read_memory(data.data_ptr(), READ_BYTES, threads)
        read.append(READ_BYTES / (time.perf_counter() - started))
        started = time.perf_counter()
        done = library.dot_products(DOT_ROUNDS, threads)
        dots.append(done / (time.perf_counter() - started))
    return {"gb_s": max(read) / 1e9, "gmac_s": max(dots) / 1e9}
