"""The launch of the product over a split K that adds its parts: one launch instead of two.

It serves tiles of the table with `adds_splits`. No shipped tile has it, since no GPU has measured it. The layers of a
device share counters, which are zeroed when a layer is loaded; every launch leaves them zeroed. Two streams would mix
up their numbers. So one stream has them at a time, and the other is served by two launches; see turn.py. It is for
NVIDIA only: AMD's barrier does not wait for the sums that other waves store.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from morphoquant_vllm.gpu.kernels.gemm_adding import int4_gemm_adding
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.product_launch import Product
from morphoquant_vllm.gpu.tiles import Tile
from morphoquant_vllm.gpu.turn import Turn


class Counters:
    """`count` counters, int32, all zeros between launches."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.memory = torch.zeros(count, dtype=torch.int32, device=device)
        self.turn = Turn(device)


# The layers hold references to their counters. Captured graphs contain the address, which stays the same.
_COUNTERS: WeakValueDictionary[tuple[torch.device, int], Counters] = WeakValueDictionary()


def counters_of(device: torch.device, count: int) -> Counters:
    """The `count` counters that layers of a device share; the caller must hold a reference to them."""
    found = _COUNTERS.get((device, count))
    if found is None:
        found = Counters(device, count)
        _COUNTERS[device, count] = found
    return found


def has_counters() -> bool:
    """Whether a layer of this process has counters, which must keep their zeros."""
    return bool(_COUNTERS)


def most_counters(tile: Tile, units: int) -> int:
    """The largest number of output tiles of a product with a split K on `units` multiprocessors.

    K is split only if there are fewer tiles than the programs that should run at a time; see `tiles.splits_of`.
    """
    return units * tile.programs_per_unit


def multiply_and_add(
    product: Product,
    codes: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    parts: Tensor,
    y: Tensor,
    counters: Tensor,
    tile: Tile,
) -> Launch:
    """y [M, N] of codes int8 [M, K], M >= 1; `parts` [splits, M, N] holds the sums of two or more parts of K."""
    described = product.multiply(codes, rows, bias, parts, tile, parts.shape[0])
    if counters.numel() < described.grid[0]:
        raise ValueError(f"{described.grid[0]} tiles need as many counters, not {counters.numel()}")
    arguments = described.arguments | {"part_ptr": parts, "out_ptr": y, "counter_ptr": counters}
    del arguments["PARTIAL"]
    return Launch(int4_gemm_adding, described.grid, arguments, described.options)
