"""Measure tiles on the GPU at hand and write a tile table: `python -m morphoquant_vllm.triton_kernels.autotune OUT`.

For every range of tokens and group size of the shipped table, the tile with the least geometric mean of times over the
shapes wins. Only tiles whose binaries pass `proof` are measured. Serve with MORPHOQUANT_TILES=OUT to use the table.
Nothing in serving measures anything.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..errors import MorphoQuantError
from . import tiles
from .device import Profile, device_name, profile_of
from .layout import TILE_N, GpuWeight, tile_channels
from .tiles import Tile

# N, K of a 7B model's linears: qkv, o, gate_up, down.
SHAPES = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
GROUP_SIZES = (32, 64, 128)
# Tokens at which a range without an upper end is measured.
MANY_TOKENS = 2048


def candidates(tile: Tile, group_size: int) -> Iterator[Tile]:
    """Tiles to try in the place of `tile`, at one group size; with two-level scales, for all of them."""
    rows = (128, 256) if tile.max_tokens is None else (tile.block_m,)
    for block_n, block_m, warps, stages, unroll in itertools.product((32, 64, 128), rows, (4, 8), (2, 3, 4, 6), (1, 2)):
        yield replace(
            tile,
            group_sizes=GROUP_SIZES if tile.two_level else (group_size,),
            block_n=block_n,
            block_m=block_m,
            warps=warps,
            stages=stages,
            unroll=unroll,
            programs_per_unit=1,
        )


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
    scale = torch.rand((in_features // group_size, blocks * TILE_N), device=device) / 100
    return GpuWeight(codes.to(torch.uint8), scale.bfloat16(), bias.new_empty(0), bias)


def milliseconds(tile: Tile, tokens: int, weight: GpuWeight, profile: Profile) -> float:
    """Median time of one product inside a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    from . import launch

    device = weight.codes.device
    out_features, steps = weight.absorbed_bias.shape[1], weight.codes.shape[1]
    in_features = steps * 2 * weight.codes.shape[3]
    codes = torch.randint(-8, 8, (tokens, in_features), dtype=torch.int8, device=device)
    rows = torch.zeros(tokens, dtype=torch.int32, device=device)
    gain = torch.ones(2, device=device)
    splits = tiles.splits_of(tile, tokens, out_features, steps, profile.units)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        return float(
            do_bench_cudagraph(
                lambda: launch.matmul(
                    codes, rows, weight, gain, None, torch.bfloat16, tile, splits, profile.inline_assembly
                ),
                return_mode="median",
            )
        )


def sound(tile: Tile, group_size: int, target: str, profile: Profile) -> list[Tile]:
    """The tile with each number of programs per multiprocessor worth trying; none where its binary fails a proof."""
    from . import ahead, occupancy, proof, resources

    kernel = ahead.build_gemm(target, tile, group_size)
    used = resources.resources(kernel)
    if proof.gemm_problems(used, profile.architecture, tile):
        return []
    if tile.two_level and profile.inline_assembly and proof.level_problems(kernel):
        return []
    fitting = occupancy.programs_per_unit(used, profile.architecture)
    return [replace(tile, programs_per_unit=programs) for programs in sorted({1, min(2, fitting), min(4, fitting)})]


def best_tile(tile: Tile, group_size: int, target: str, profile: Profile, device: torch.device) -> Tile:
    """The fastest sound candidate for one range of tokens and one group size, with its times as the reason.

    Of two-level scales for every group size: their kernels and layout do not depend on it.
    """
    tokens = tile.max_tokens or MANY_TOKENS
    weights = [random_weight(*shape, group_size, tile.two_level, device) for shape in SHAPES]
    best, least, times = tile, math.inf, [0.0]
    for candidate in candidates(tile, group_size):
        for variant in sound(candidate, group_size, target, profile):
            measured = [milliseconds(variant, tokens, weight, profile) for weight in weights]
            mean = math.exp(sum(map(math.log, measured)) / len(measured))
            if mean < least:
                best, least, times = variant, mean, measured
    found = ", ".join(f"{shape[0]}x{shape[1]} {1000 * time:.1f} us" for shape, time in zip(SHAPES, times, strict=False))
    return replace(best, reason=f"measured on {torch.cuda.get_device_name(device)} at M = {tokens}: {found}")


def write_table(name: str, found: list[Tile], output: Path) -> None:
    """The table in force with other tiles for the architecture `name`, written whole or not at all."""
    table = {key: asdict(item) for key, item in tiles.architectures().items()}
    table[name]["tiles"] = [asdict(tile) for tile in found]
    for entry in table.values():
        del entry["name"]
    staged = output.with_name(output.name + ".part")
    staged.write_text(json.dumps({"version": tiles.TABLE_VERSION, "architectures": table}, indent=2) + "\n")
    tiles.load(staged)
    os.replace(staged, output)


def main(output: Annotated[Path, typer.Argument(help="where the table goes")]) -> None:
    """Measure on the GPU at hand; all other architectures of the table stay as they are."""
    if not torch.cuda.is_available():
        raise MorphoQuantError("no GPU is at hand: tiles can only be measured on one")
    if not output.absolute().parent.is_dir():
        raise MorphoQuantError(f"{output}: the directory does not exist; make it first")
    device = torch.device("cuda", torch.cuda.current_device())
    profile = profile_of(device)
    name = device_name(device)
    target = f"sm_{name.replace('.', '')}" if profile.architecture.vendor == "nvidia" else name
    ranges = {(tile.two_level, tile.max_tokens): tile for tile in profile.architecture.tiles}
    found = []
    for tile in ranges.values():
        for group_size in GROUP_SIZES[:1] if tile.two_level else GROUP_SIZES:
            found.append(best_tile(tile, group_size, target, profile, device))
            kind = "two-level scales" if tile.two_level else f"G = {group_size}"
            print(f"M <= {tile.max_tokens} {kind}: {found[-1].reason}", flush=True)
    write_table(profile.architecture.name, found, output)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MorphoQuantError as problem:
        sys.exit(f"error: {problem}")
