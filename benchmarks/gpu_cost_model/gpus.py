"""Published figures of the GPUs for which times are estimated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU. Figures from NVIDIA's data sheets and architecture papers, without sparsity."""

    name: str
    architecture: str  # a key of the tile table
    units: int  # multiprocessors
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second
    int8: float  # multiply-adds per second, times two
    bfloat16: float


GPUS = {
    "L20": Gpu("L20", "sm_89", 92, 2.52e9, 864e9, 239e12, 119.5e12),
    "A100": Gpu("A100 80GB SXM", "sm_80", 108, 1.41e9, 2039e9, 624e12, 312e12),
    "H100": Gpu("H100 SXM", "sm_90", 132, 1.83e9, 3350e9, 1979e12, 989e12),
}
# Warp instructions that a multiprocessor issues per cycle: one from each of four schedulers.
ISSUES_PER_CYCLE = 4
