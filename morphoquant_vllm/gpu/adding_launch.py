"""The launch of the product over a split K that adds its parts itself: one launch instead of two.

For tiles of the table with `adds_splits`, of which none ships: no GPU has measured it. The layers of a device share
counters, zeroed when a layer is loaded; every launch leaves them zeroed. Two streams would mix up their numbers, so one
has them at a time, and the other is served by two launches; see turn.py. For NVIDIA only: AMD's barrier does not wait
for the sums that other waves store.
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


# Kept by the layers that use them, at one address, which captured graphs have seen.
_COUNTERS: WeakValueDictionary[tuple[torch.device, int], Counters] = WeakValueDictionary()


def counters_of(device: torch.device, count: int) -> Counters:
    """The counters that layers of a device share, if they need as many; whoever asks must keep them."""
    found = _COUNTERS.get((device, count))
    if found is None:
        found = Counters(device, count)
        _COUNTERS[device, count] = found
    return found


def most_counters(tile: Tile, units: int) -> int:
    """Tiles of the output that a product on `units` multiprocessors has at most while K is split.

    K is split only if there are fewer tiles than programs that are wanted at a time; see `tiles.splits_of`.
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
    """y [M, N] of codes int8 [M, K], M >= 1, over as many parts of K as `parts` [splits, M, N] has; two or more."""
    described = product.multiply(codes, rows, bias, parts, tile, parts.shape[0])
    if counters.numel() < described.grid[0]:
        raise ValueError(f"{described.grid[0]} tiles need as many counters, not {counters.numel()}")
    arguments = described.arguments | {"part_ptr": parts, "out_ptr": y, "counter_ptr": counters}
    del arguments["PARTIAL"]
    return Launch(int4_gemm_adding, described.grid, arguments, described.options)
