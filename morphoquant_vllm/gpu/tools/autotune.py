"""Measure tiles on this machine's GPU and write a tile table: `python -m morphoquant_vllm.gpu.tools.autotune OUT`.

There is a search for every range of tokens, and each group size or two-level scales. The tile wins with which a layer's
linears take least time together, each with its quantizer. Then the int8 path is measured beside the winners; see
autotune_int8.py. As in a server, weights are not in the cache when they are used. Only tiles whose binaries pass
`binary_checks` and whose results are the reference's are measured. They are compiled on all cores. Serve with
MORPHOQUANT_TILES=OUT to use the table. A server measures nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import tiles
from morphoquant_vllm.gpu.device import Profile, device_name, profile_of
from morphoquant_vllm.gpu.layout import TILE_N, GpuActivation, GpuWeight, scale_words, tile_channels
from morphoquant_vllm.gpu.tiles import Int8Tile, Tile
from morphoquant_vllm.gpu.tools import autotune_int8
from morphoquant_vllm.gpu.tools.timing import cold_copies
from morphoquant_vllm.numerics.limits import GROUP_SIZES

# N, K of a 7B model's linears: qkv, o, gate_up, down.
SHAPES = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
# Largest number of tokens of each range, at which it is measured; the last range has no end.
RANGES = (1, 4, 16, 32, 64, 256, None)
MANY_TOKENS = 2048
MAX_SPLITS = 16
# From this many tokens on, joined operands are tried. They are for products of warp groups, from 64 output channels and
# four warps on. With 128 channels and 16 tokens a turn has 249 instructions with them, and 277 without.
JOINED_FROM = 16


@dataclass(frozen=True)
class Search:
    """The sizes that are tried for up to `tokens` tokens."""

    tokens: int
    shapes: tuple[tuple[int, int], ...]  # block_n and warps
    block_m: tuple[int, ...]
    depths: tuple[tuple[int, int], ...]  # stages and unroll


SEARCHES = (
    # One warp issues least for an output's weights: 6.6 instructions a turn. The table's tile for 16 tokens has 9.1.
    Search(
        16, ((32, 2), (64, 1), (64, 2), (64, 4), (128, 4), (128, 8)), (16,), ((3, 1), (4, 1), (6, 1), (3, 2), (4, 2))
    ),
    # Joined, four warps on 128 channels have 7.9 at 32 tokens and 8.1 at 64; the table's eight have 12.4 and 10.4.
    Search(32, ((32, 4), (64, 4), (128, 4), (128, 8)), (32,), ((3, 1), (4, 1), (6, 1))),
    Search(64, ((32, 4), (64, 4), (128, 4), (128, 8)), (32, 64), ((3, 1), (4, 1), (6, 1))),
    Search(MANY_TOKENS, ((64, 4), (128, 4), (128, 8)), (64, 128, 256), ((3, 1), (4, 1))),
)


def candidates(max_tokens: int | None, group_size: int, two_level: bool, vendor: str = "nvidia") -> Iterator[Tile]:
    """Tiles to try for one range of tokens, at one group size; with two-level scales, for all of them.

    If the vendor's GPUs can add the parts of K in the kernel, such a tile follows the same tile without it.
    """
    tokens = max_tokens or MANY_TOKENS
    search = next(search for search in SEARCHES if tokens <= search.tokens)
    group_sizes = GROUP_SIZES if two_level else (group_size,)
    joinable = tokens >= JOINED_FROM and (two_level or group_size != tiles.UNJOINABLE)
    for (block_n, warps), block_m, (stages, unroll), joined in itertools.product(
        search.shapes, search.block_m, search.depths, (False, True)[: 1 + joinable]
    ):
        sizes = (block_n, block_m, warps, stages, unroll, joined)
        for adds_splits in (False, True)[: 1 + (vendor == "nvidia" and block_m <= tiles.ADDING_BLOCK_M)]:
            yield Tile(max_tokens, group_sizes, two_level, *sizes, 1, MAX_SPLITS, adds_splits, reason="")


def random_weight(
    out_features: int, in_features: int, group_size: int, two_level: bool, device: torch.device
) -> GpuWeight:
    """A weight record in the kernels' layout, of random codes."""
    channels = tile_channels(group_size, two_level)
    blocks = -(-out_features // TILE_N)
    codes = torch.randint(256, (blocks, in_features // channels, TILE_N, channels // 2), device=device)
    bias = torch.zeros((2, out_features), device=device)
    if two_level:
        words = torch.full((in_features // (2 * channels), blocks * TILE_N), 0x04030201, device=device).int()
        channel_scale = torch.full((out_features,), 0.01, device=device)
        return GpuWeight(codes.to(torch.uint8), words, channel_scale, bias)
    scale = (torch.rand((blocks * TILE_N, in_features // group_size), device=device) / 100).bfloat16()
    words = scale_words(scale, group_size).T.contiguous()
    return GpuWeight(codes.to(torch.uint8), words, bias.new_empty(0), bias)


def plain_activation(out_features: int, in_features: int, device: torch.device) -> GpuActivation:
    """The quantizer's tables: one row beside `massive`, no massive tokens, and shuffled channels.

    In the layer of SHAPES with more inputs than outputs, down, channels come in order; see mlp_channel_order.py.
    """
    rows = torch.ones((2, in_features), device=device)
    order = torch.randperm(0 if in_features > out_features else in_features, device=device).int()
    return GpuActivation(
        inverse=rows,
        centre=torch.zeros_like(rows),
        limit=rows.to(torch.int8) * 7,
        gain=rows[:, 0].contiguous(),
        channel_order=order,
        massive_channel=torch.arange(4, device=device).int()[None],
        massive_low=rows[:1, :4] * 1e3,
        massive_high=rows[:1, :4] * 2e3,
    )


def milliseconds(tile: Tile, tokens: int, weights: list[GpuWeight], profile: Profile) -> float:
    """Median time of quantizer and product, in a CUDA graph that uses each of the `weights` once."""
    from morphoquant_vllm.gpu import adding_launch, launch
    from morphoquant_vllm.gpu.tools import timing

    device = weights[0].codes.device
    out_features, k_tiles = weights[0].absorbed_bias.shape[1], weights[0].codes.shape[1]
    in_features = k_tiles * 2 * weights[0].codes.shape[3]
    activation = plain_activation(out_features, in_features, device)
    x = torch.randn((tokens, in_features), dtype=torch.bfloat16, device=device)
    modality = torch.zeros(tokens, dtype=torch.int32, device=device)
    splits = tiles.splits_of(tile, tokens, out_features, k_tiles, profile.units)
    # Zeroed before the measurement, as in a bound layer.
    counters = adding_launch.Counters(device, adding_launch.most_counters(tile, profile.units)).memory

    def linear(x: torch.Tensor, weight: GpuWeight) -> torch.Tensor:
        codes, rows = launch.quantize(x, modality, activation, False, profile.pdl, units=profile.units)
        settings = (tile, splits, profile.inline_assembly, profile.pdl)
        return launch.matmul(codes, rows, weight, activation.gain, None, torch.bfloat16, *settings, counters)

    calls = [lambda x, weight=weight: linear(x, weight) for weight in weights]
    return timing.microseconds(timing.graph_of(calls, x), len(calls)) / 1000


def sound(tile: Tile, group_size: int, target: str, profile: Profile) -> list[Tile]:
    """The tile with each number of programs per multiprocessor worth trying; empty if its binary fails a check."""
    from morphoquant_vllm.gpu.tools import (
        aot_compile,
        binary_checks,
        binary_resources,
        occupancy,
    )

    kernel = aot_compile.build_gemm(target, tile, group_size)
    used = binary_resources.resources(kernel)
    if binary_checks.gemm_problems(used, profile.architecture, tile):
        return []
    if tile.two_level and profile.inline_assembly and binary_checks.level_problems(kernel):
        return []
    fitting = occupancy.programs_per_unit(used, profile.architecture)
    if tile.adds_splits:
        adding = aot_compile.build_gemm_adding(target, tile, group_size)
        used = binary_resources.resources(adding)
        if binary_checks.gemm_problems(used, profile.architecture, tile) or binary_checks.counter_problems(adding):
            return []
        fitting = min(fitting, occupancy.programs_per_unit(used, profile.architecture))
    return [replace(tile, programs_per_unit=count) for count in sorted({min(count, fitting) for count in (1, 2, 4, 8)})]


def compiled(job: tuple[Tile, int, str]) -> list[Tile]:
    """The result of `sound`, if the tile computes right on this GPU; runs in a separate process.

    It also compiles the kernels into Triton's cache for the measuring process.
    """
    from morphoquant_vllm.gpu import selfcheck

    tile, group_size, target = job
    torch.set_num_threads(1)
    device = torch.device("cuda", torch.cuda.current_device())
    profile = profile_of(device)
    found = sound(tile, group_size, target, profile)
    settings = (torch.bfloat16, device, profile)
    # A tile that adds the parts is sometimes served by two launches; see adding_launch.py.
    ways = [(tile, 1), (tile, 2)] + [(replace(tile, adds_splits=False), 2)] * tile.adds_splits
    if any(selfcheck.problem_of_tile(way, group_size, splits, *settings) for way, splits in ways if found):
        return []
    return found


def splits_some(tile: Tile, tokens: int, units: int) -> bool:
    """Whether K is split in any layer of SHAPES."""
    channels = tile_channels(tile.group_sizes[0], tile.two_level)
    return any(tiles.splits_of(tile, tokens, shape[0], shape[1] // channels, units) > 1 for shape in SHAPES)


def best_tile(variants: list[Tile], weights: list[list[GpuWeight]], profile: Profile, device: torch.device) -> Tile:
    """The fastest of the sound candidates for one range of tokens, with its times as the reason; `weights` by shape."""
    tokens = variants[0].max_tokens or MANY_TOKENS
    best, least, times = variants[0], math.inf, [0.0]
    for variant in variants:
        if variant.adds_splits and not splits_some(variant, tokens, profile.units):
            # The launches are the same as without adds_splits.
            continue
        measured = [milliseconds(variant, tokens, copies, profile) for copies in weights]
        if sum(measured) < least:
            best, least, times = variant, sum(measured), measured
    found = ", ".join(f"{shape[0]}x{shape[1]} {1000 * time:.1f} us" for shape, time in zip(SHAPES, times, strict=False))
    return replace(best, reason=f"measured on {torch.cuda.get_device_name(device)} at M = {tokens}: {found}")


def best_int8(found: list[Tile], target: str, profile: Profile, device: torch.device) -> Int8Tile:
    """The int8 path's tile with the number of tokens from which it serves; `found` are the tiles of the other path.

    Raises MorphoQuantError if no tile passes the proofs.
    """
    architecture = profile.architecture
    tried = autotune_int8.candidates(architecture.int8.descriptors, fused=architecture.name == "sm_90")
    jobs = [(tile, target) for tile in tried]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        variants = list(itertools.chain(*pool.map(autotune_int8.compiled, jobs, chunksize=1)))
    if not variants:
        raise MorphoQuantError("no tile of the int8 path passes the proofs; keep the table")
    weights = weights_of(GROUP_SIZES[0], True, device)
    others = replace(architecture, tiles=tuple(found))

    def time(tile: Int8Tile, tokens: int) -> float:
        activations = [plain_activation(*shape, device) for shape in SHAPES]
        return sum(
            autotune_int8.milliseconds(tile, tokens, copies, activation, profile)
            for copies, activation in zip(weights, activations, strict=True)
        )

    def other(tokens: int) -> float:
        tile = others.tile(tokens, GROUP_SIZES[0], two_level=True)
        return sum(milliseconds(tile, tokens, copies, profile) for copies in weights)

    return autotune_int8.best(variants, time, other, torch.cuda.get_device_name(device))


def weights_of(group_size: int, two_level: bool, device: torch.device) -> list[list[GpuWeight]]:
    """For each of SHAPES, so many layers that the cache cannot hold them."""
    return [
        [random_weight(*shape, group_size, two_level, device) for _ in range(cold_copies(shape[0] * shape[1] // 2))]
        for shape in SHAPES
    ]


def write_table(name: str, found: list[Tile], int8: Int8Tile, output: Path) -> None:
    """Write the table in force with other tiles for the architecture `name`, atomically."""
    table = {key: asdict(item) for key, item in tiles.architectures().items()}
    table[name] |= {"tiles": [asdict(tile) for tile in found], "int8": asdict(int8)}
    for entry in table.values():
        del entry["name"]
    staged = output.with_name(output.name + ".part")
    staged.write_text(json.dumps({"version": tiles.TABLE_VERSION, "architectures": table}, indent=2) + "\n")
    tiles.load(staged)
    os.replace(staged, output)


def main(output: Annotated[Path, typer.Argument(help="file of the new table")]) -> None:
    """Measure on this machine's GPU; the other architectures of the table stay unchanged."""
    if not torch.cuda.is_available():
        raise MorphoQuantError("this machine has no GPU; tiles can only be measured on one")
    if not output.absolute().parent.is_dir():
        raise MorphoQuantError(f"{output}: the directory does not exist; make it first")
    device = torch.device("cuda", torch.cuda.current_device())
    profile = profile_of(device)
    name = device_name(device)
    target = f"sm_{name.replace('.', '')}" if profile.architecture.vendor == "nvidia" else name
    kinds = [(group_size, False) for group_size in GROUP_SIZES] + [(GROUP_SIZES[0], True)]
    vendor = profile.architecture.vendor
    tried = [(tile, kind[0]) for kind in kinds for tokens in RANGES for tile in candidates(tokens, *kind, vendor)]
    jobs = [(tile, group_size, target) for tile, group_size in tried]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        sounds = pool.map(compiled, jobs, chunksize=1)
    print(f"{len(jobs)} tiles compiled, {sum(map(bool, sounds))} pass the proofs", flush=True)
    found = []
    for group_size, two_level in kinds:
        weights = weights_of(group_size, two_level, device)
        for tokens in RANGES:
            variants = [
                variant
                for (tile, size, _), passed in zip(jobs, sounds, strict=True)
                if (tile.max_tokens, size, tile.two_level) == (tokens, group_size, two_level)
                for variant in passed
            ]
            if not variants:
                raise MorphoQuantError(f"no tile for up to {tokens} tokens passes the proofs on {name}; keep the table")
            found.append(best_tile(variants, weights, profile, device))
            kind = "two-level scales" if two_level else f"G = {group_size}"
            print(f"M <= {tokens} {kind}: {found[-1].reason}", flush=True)
    weights.clear()
    int8 = best_int8(found, target, profile, device)
    print(f"int8 path from M = {int8.min_tokens}: {int8.reason}", flush=True)
    write_table(profile.architecture.name, found, int8, output)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MorphoQuantError as problem:
        sys.exit(f"error: {problem}")
