"""The launch of the product over a split K that adds its parts itself: one launch instead of two.

Nothing that serves uses it: no GPU has measured it. A layer that does keeps counters of its own, `counters` of its
widest tile, zeroed when it is loaded; every launch leaves them zeroed. Two calls of one layer at a time, on two
streams, would mix up their numbers. For NVIDIA only: AMD's barrier does not wait for the sums that other waves store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.gpu.kernels.gemm_adding import int4_gemm_adding
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.product_launch import Product
from morphoquant_vllm.gpu.tiles import Tile


def counters(tile: Tile, units: int, device: torch.device) -> Tensor:
    """Zeros, int32, for as many tiles of the output as a product on `units` multiprocessors has while K is split.

    K is split only if there are fewer tiles than programs that are wanted at a time; see `tiles.splits_of`.
    """
    return torch.zeros(units * tile.programs_per_unit, dtype=torch.int32, device=device)


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
