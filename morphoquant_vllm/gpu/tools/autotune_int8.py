"""The part of `autotune` that measures the int8 path: its best tile, and from how many tokens it serves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from morphoquant_vllm.gpu.device import Profile, profile_of
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight
from morphoquant_vllm.gpu.tiles import FUSED, Int8Tile

# At which the tile is chosen.
TOKENS = 2048
# At which both paths are measured, to find from how many tokens this one serves.
STARTS = (256, 512, 1024, 2048, 4096)
# block_n, block_m and warps: that of the table, the wider ones that hold more of either operand, and narrower ones.
SHAPES = ((128, 128, 8), (128, 128, 4), (128, 256, 8), (64, 256, 4), (64, 128, 4))
BLOCKS_K = (64, 128)
STAGES = (2, 3, 4)


def candidates(descriptors: bool, fused: bool) -> Iterator[Int8Tile]:
    """Tiles to try; `fused`: those of the fused kernel too."""
    for (block_n, block_m, warps), block_k, stages in itertools.product(SHAPES, BLOCKS_K, STAGES):
        yield Int8Tile(
            None, block_n, block_m, block_k, warps, stages, descriptors, False, programs_per_unit=1, reason=""
        )
    for block_m, stages in itertools.product((128, 256) if fused else (), (3, 4)):
        block_n, block_k, warps = FUSED
        yield Int8Tile(None, block_n, block_m, block_k, warps, stages, False, True, programs_per_unit=1, reason="")


def compiled(job: tuple[Int8Tile, str]) -> list[Int8Tile]:
    """The tile with as many programs as fit; none if its binary fails a check or its results are wrong on this GPU.

    Run it in a separate process, as its counterpart in `autotune`.
    """
    from morphoquant_vllm.gpu import selfcheck
    from morphoquant_vllm.gpu.tools import (
        aot_int8,
        binary_checks,
        binary_resources,
        occupancy,
    )

    tile, target = job
    torch.set_num_threads(1)
    device = torch.device("cuda", torch.cuda.current_device())
    profile = profile_of(device)
    kernel = aot_int8.build_int8_gemm(target, tile)
    problems = binary_checks.int8_problems(kernel, profile.architecture, tile)
    if problems or binary_checks.unpack_problems(aot_int8.build_unpack(target)):
        return []
    if selfcheck.problem_of_int8_path(tile, torch.bfloat16, device, profile):
        return []
    fitting = occupancy.programs_per_unit(binary_resources.resources(kernel), profile.architecture)
    return [replace(tile, programs_per_unit=fitting)]


def milliseconds(
    tile: Int8Tile, tokens: int, weights: list[GpuWeight], activation: GpuActivation, profile: Profile
) -> float:
    """Median time of quantizer, unpacking and product, in a CUDA graph that uses each of the `weights` once."""
    from morphoquant_vllm.gpu import int8_path, launch
    from morphoquant_vllm.gpu.tools import timing

    device = weights[0].codes.device
    x = torch.randn((tokens, activation.in_features), dtype=torch.bfloat16, device=device)
    modality = torch.zeros(tokens, dtype=torch.int32, device=device)
    workspace = torch.empty(int8_path.workspace_bytes(weights[0]), dtype=torch.int8, device=device)

    def linear(x: torch.Tensor, weight: GpuWeight) -> torch.Tensor:
        codes, rows = launch.quantize(x, modality, activation, False, profile.pdl, units=profile.units)
        if not tile.fused:
            int8_path.unpack(weight, workspace, inline_assembly=profile.inline_assembly, pdl=profile.pdl)
        return int8_path.int8_matmul(
            codes=codes,
            rows=rows,
            weight=weight,
            workspace=workspace,
            gain=activation.gain,
            bias=None,
            dtype=torch.bfloat16,
            tile=tile,
            pdl=profile.pdl,
        )

    calls = [lambda x, weight=weight: linear(x, weight) for weight in weights]
    return timing.microseconds(timing.graph_of(calls, x), len(calls)) / 1000


def first_tokens(starts: Sequence[int], times: Sequence[float], others: Sequence[float]) -> int | None:
    """The least of `starts` from which on the path always takes less time than the other one; None if there is none."""
    won = itertools.takewhile(lambda one: one[1] < one[2], zip(starts[::-1], times[::-1], others[::-1], strict=True))
    return min((start for start, *_ in won), default=None)


def best(
    variants: list[Int8Tile], time: Callable[[Int8Tile, int], float], other: Callable[[int], float], device: str
) -> Int8Tile:
    """The fastest tile at TOKENS, with the tokens from which it serves; its times on `device` are the reason.

    `time` and `other` give the milliseconds of all layers together, by this path and by the other one.
    """
    least, tile = math.inf, variants[0]
    for variant in variants:
        measured = time(variant, TOKENS)
        if measured < least:
            least, tile = measured, variant
    times, others = [time(tile, start) for start in STARTS], [other(start) for start in STARTS]
    found = ", ".join(
        f"M = {start} {1000 * one:.1f} us (the other path {1000 * two:.1f})"
        for start, one, two in zip(STARTS, times, others, strict=True)
    )
    reason = f"measured on {device}, the layers together: {found}"
    return replace(tile, min_tokens=first_tokens(STARTS, times, others), reason=reason)
