"""How many programs of a compiled kernel one multiprocessor holds at a time."""

from __future__ import annotations

from morphoquant_vllm.gpu.tiles import Architecture
from morphoquant_vllm.gpu.tools.binary_resources import Resources

# A GPU allots registers to whole warps, in steps of this size.
REGISTER_STEP = {"nvidia": 256, "amd": 512}
WARP = {"nvidia": 32, "amd": 64}
# Bytes of shared memory that CUDA reserves in each program.
RESERVED_SHARED_MEMORY = {"nvidia": 1024, "amd": 0}


def programs_per_unit(used: Resources, architecture: Architecture) -> int:
    """Programs that fit by registers, shared memory and threads, whichever is least; 0 if not even one does."""
    vendor = architecture.vendor
    if used.shared_memory > architecture.shared_memory:
        return 0
    step = REGISTER_STEP[vendor]
    warp_registers = -(-used.registers * WARP[vendor] // step) * step
    by_registers = architecture.unit_registers // (warp_registers * (used.threads // WARP[vendor]))
    by_memory = architecture.unit_shared_memory // (used.shared_memory + RESERVED_SHARED_MEMORY[vendor] or 1)
    return min(by_registers, by_memory, architecture.unit_threads // used.threads)
