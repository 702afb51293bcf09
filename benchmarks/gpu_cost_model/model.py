"""The estimate: the least time of the matrix kernels, by their reads, issued instructions and multiplications.

    bandwidth  bytes of weights, scales, codes and output (partial sums twice) over the GPU's bandwidth
    issue      warp instructions of the main loop over what the schedulers issue
    units      int8 multiply-adds, with padded tiles, over the tensor cores' peak
    estimate   the largest of the three; issue and units are stretched if programs do not divide evenly

The int8 path is two kernels, one after the other. Unpacking takes the larger of its bandwidth and its issue, and the
product takes the estimate above. The limits of the path are sums over both kernels.

The real time is longer, since these are left out: latency, cache misses, and instructions outside the loop. So are
conversions at less than full rate, clocks below boost, and launches. Outside a CUDA graph, the two or three launches
take some microseconds each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.gpu_cost_model.gpus import ISSUES_PER_CYCLE, Gpu
from morphoquant_vllm.gpu.layout import TILE_N, tile_channels
from morphoquant_vllm.gpu.tiles import Int8Tile, Tile
from morphoquant_vllm.gpu.tools.binary_resources import Resources


@dataclass(frozen=True)
class Estimate:
    """Seconds by each limit, and the estimate that follows from them."""

    bandwidth: float
    issue: float
    units: float
    waves: float  # programs over what the device holds at a time
    splits: int
    seconds: float
    bfloat16: float  # the same product in bfloat16, by bandwidth and peak alone: a bound of all libraries

    @property
    def limit(self) -> str:
        """The limit that decides."""
        return max(("bandwidth", "issue", "units"), key=lambda name: getattr(self, name))


def scale_bytes(out_features: int, in_features: int, group_size: int, two_level: bool) -> int:
    """Bytes of a layer's scales as the kernels read them."""
    if two_level:
        # A word for two tiles at every group size, and the channel scales.
        return out_features * (4 * _ceil(in_features, turn_channels(group_size, two_level)) + 4)
    return out_features * 2 * in_features // group_size


def turn_channels(group_size: int, two_level: bool) -> int:
    """Channels of K that a turn of the loop takes."""
    return tile_channels(group_size, two_level) * (1 + two_level)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def stretch(programs: int, units: int, fitting: int) -> float:
    """The factor by which uneven work lengthens compute: the busiest multiprocessor's programs over the mean.

    Programs on one multiprocessor share its schedulers. So they count one by one as long as all are resident at once.
    Later ones come in whole waves of `fitting`.
    """
    if programs <= units * fitting:
        return math.ceil(programs / units) * units / programs
    return math.ceil(programs / (units * fitting)) * units * fitting / programs


def estimate(
    gpu: Gpu,
    tile: Tile,
    splits: int,
    used: Resources,
    fitting: int,
    tokens: int,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Estimate:
    """One product of M x N x K, by a tile that compiles to `used`; `fitting` of its programs share a unit."""
    weights = out_features * in_features // 2 + scale_bytes(out_features, in_features, group_size, tile.two_level)
    moved = weights + tokens * in_features + 2 * tokens * out_features
    if splits > 1:
        moved += 2 * 4 * splits * tokens * out_features
    turns = _ceil(in_features, turn_channels(group_size, tile.two_level))
    per_turn = len(used.loop) / tile.unroll
    issue, units, waves = _compute(
        gpu, tile, splits, used, fitting, tokens, out_features, in_features, turns * per_turn
    )
    bandwidth = moved / gpu.bandwidth
    bfloat16 = bfloat16_seconds(gpu, tokens, out_features, in_features)
    return Estimate(bandwidth, issue, units, waves, splits, max(bandwidth, issue, units), bfloat16)


def estimate_int8(
    gpu: Gpu,
    tile: Int8Tile,
    unpacking: Resources,
    used: Resources,
    fitting: int,
    tokens: int,
    out_features: int,
    in_features: int,
) -> Estimate:
    """The same product by the int8 path, of layers with two-level scales; two kernels compiled to these resources."""
    turn = turn_channels(0, two_level=True)
    unpacked = _ceil(out_features, TILE_N) * TILE_N * _ceil(in_features, turn) * turn
    packed = unpacked // 2 + scale_bytes(out_features, in_features, 0, two_level=True)
    unpack_bandwidth = (packed + unpacked) / gpu.bandwidth
    # A program runs through all its instructions once.
    warp_instructions = unpacked // (TILE_N * turn) * len(unpacking.instructions) * (unpacking.threads // 32)
    unpack_issue = warp_instructions / (ISSUES_PER_CYCLE * gpu.units * gpu.clock)
    turns = _ceil(in_features, tile.block_k)
    issue, units, waves = _compute(
        gpu, tile, 1, used, fitting, tokens, out_features, in_features, turns * len(used.loop)
    )
    bandwidth = (unpacked + tokens * in_features + 2 * tokens * out_features) / gpu.bandwidth
    return Estimate(
        bandwidth=unpack_bandwidth + bandwidth,
        issue=unpack_issue + issue,
        units=units,
        waves=waves,
        splits=1,
        seconds=max(unpack_bandwidth, unpack_issue) + max(bandwidth, issue, units),
        bfloat16=bfloat16_seconds(gpu, tokens, out_features, in_features),
    )


def _compute(
    gpu: Gpu,
    tile: Tile | Int8Tile,
    splits: int,
    used: Resources,
    fitting: int,
    tokens: int,
    out_features: int,
    in_features: int,
    per_warp: float,
) -> tuple[float, float, float]:
    """Seconds of issue and of the matrix units, and waves; a warp issues `per_warp` instructions over the whole K."""
    tiles_m, tiles_n = _ceil(tokens, tile.block_m), _ceil(out_features, tile.block_n)
    programs = tiles_m * tiles_n * splits
    # Idle multiprocessors lengthen compute, but a few busy ones can use the whole bandwidth.
    uneven = stretch(programs, gpu.units, fitting)
    instructions = tiles_m * tiles_n * per_warp * (used.threads // 32)
    issue = instructions / (ISSUES_PER_CYCLE * gpu.units * gpu.clock) * uneven
    units = 2 * tiles_m * tile.block_m * tiles_n * tile.block_n * in_features / gpu.int8 * uneven
    return issue, units, programs / gpu.units / fitting


def bfloat16_seconds(gpu: Gpu, tokens: int, out_features: int, in_features: int) -> float:
    """The same product in bfloat16, by bandwidth and peak alone."""
    moved = 2 * (out_features * in_features + tokens * in_features + tokens * out_features)
    return max(moved / gpu.bandwidth, 2 * tokens * out_features * in_features / gpu.bfloat16)
