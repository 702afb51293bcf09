"""python -m benchmarks.gpu_cost_model: estimate the GPU kernels' times without a GPU. Estimates, not measurements."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.command import one_line_errors
from benchmarks.models.shapes import GPU_LAYERS, GPU_TOKENS
from morphoquant_vllm.numerics.limits import GROUP_SIZES

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.gpu_cost_model.gpus import Gpu
    from benchmarks.gpu_cost_model.model import Estimate
    from morphoquant_vllm.gpu.tiles import Int8Tile, Tile
    from morphoquant_vllm.gpu.tools.binary_resources import Resources


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cost_model", description=__doc__)
    top.add_argument("--gpus", nargs="+", default=["L20", "A100", "H100"], choices=["L20", "A100", "H100"])
    top.add_argument("--group-size", type=int, default=32, choices=GROUP_SIZES)
    top.add_argument("--tokens", type=int, nargs="+", default=list(GPU_TOKENS), help="numbers of tokens")
    top.add_argument("--two-level", action="store_true", help="layers with two-level scales")
    top.add_argument("--json", type=Path, help="file to write the estimates to, too")
    return top


@cache
def compiled(architecture: str, tile: Tile, group_size: int, partial: bool) -> Resources:
    """Resources of the matrix kernel, compiled for a tile."""
    from morphoquant_vllm.gpu.tools import aot_compile as ahead
    from morphoquant_vllm.gpu.tools.binary_resources import resources

    return resources(ahead.build_gemm(architecture, tile, group_size, partial=partial))


@cache
def compiled_int8(architecture: str, tile: Int8Tile) -> tuple[Resources, Resources]:
    """Resources of the two kernels of the int8 path: unpacking, and the product compiled for a tile."""
    from morphoquant_vllm.gpu.tools import aot_int8 as ahead
    from morphoquant_vllm.gpu.tools.binary_resources import resources

    return resources(ahead.build_unpack(architecture)), resources(ahead.build_int8_gemm(architecture, tile))


def estimates(
    gpu: Gpu, tokens: int, out_features: int, in_features: int, group_size: int, two_level: bool
) -> tuple[dict[str, Estimate], str]:
    """Estimates of one product by each path that can serve it, and the path that the tile table chooses."""
    from benchmarks.gpu_cost_model.model import estimate, estimate_int8, turn_channels
    from morphoquant_vllm.gpu import tiles
    from morphoquant_vllm.gpu.tools.occupancy import programs_per_unit

    architecture = tiles.architectures()[gpu.architecture]
    tile = architecture.tile(tokens, group_size, two_level)
    # An even number with two-level scales, which take two steps a turn.
    steps = (1 + two_level) * -(-in_features // turn_channels(group_size, two_level))
    splits = tiles.splits_of(tile, tokens, out_features, steps, gpu.units)
    used = compiled(gpu.architecture, tile, group_size, splits > 1)
    fitting = programs_per_unit(used, architecture)
    sizes = (tokens, out_features, in_features)
    found = {"int4": estimate(gpu, tile, splits, used, fitting, *sizes, group_size)}
    if two_level:
        unpacking, used = compiled_int8(gpu.architecture, architecture.int8)
        fitting = programs_per_unit(used, architecture)
        found["int8"] = estimate_int8(gpu, architecture.int8, unpacking, used, fitting, *sizes)
    return found, "int8" if architecture.int8_tile(tokens, two_level) else "int4"


def empty_table(gpu: Gpu, group_size: int, two_level: bool) -> Table:
    """The table of a GPU's estimates, with its headings."""
    from rich.table import Table

    title = f"ESTIMATES, nothing measured: {gpu.name}, G = {group_size}, times in microseconds"
    table = Table(title=title + ", two-level scales" * two_level)
    headings = ("layer", "N x K", "M", "path", "splits", "bandwidth", "issue", "tensor cores", "limit", "waves")
    for heading in (*headings, "estimate", "bf16 roofline"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    return table


def cells(layer: str, sizes: tuple[int, int], tokens: int, path: str, found: Estimate) -> list[str]:
    """The line of the table of one estimate; `path` is marked if the tile table chooses it."""
    return [
        layer,
        f"{sizes[0]}x{sizes[1]}",
        str(tokens),
        path,
        str(found.splits),
        *(f"{1e6 * time:.1f}" for time in (found.bandwidth, found.issue, found.units)),
        found.limit,
        f"{found.waves:.2f}",
        f"~{1e6 * found.seconds:.1f}",
        f"~{1e6 * found.bfloat16:.1f}",
    ]


def main() -> None:
    """Compile the shipped tiles, estimate, print."""
    arguments = parser().parse_args()
    if min(arguments.tokens) < 1:
        parser().error("--tokens must be positive")
    from rich.console import Console

    from benchmarks.gpu_cost_model.gpus import GPUS

    console = Console(width=120)
    rows = []
    for gpu in (GPUS[name] for name in arguments.gpus):
        table = empty_table(gpu, arguments.group_size, arguments.two_level)
        for (layer, sizes), tokens in itertools.product(GPU_LAYERS.items(), arguments.tokens):
            paths, chosen = estimates(gpu, tokens, *sizes, arguments.group_size, arguments.two_level)
            for path, found in paths.items():
                shape = {"gpu": gpu.name, "layer": layer, "N": sizes[0], "K": sizes[1], "M": tokens}
                shape |= {"two_level": arguments.two_level, "path": path, "chosen": path == chosen}
                rows.append(shape | {"estimate": True, "limit": found.limit} | asdict(found))
                table.add_row(*cells(layer, sizes, tokens, path + "*" * (path == chosen), found))
        console.print(table)
    console.print(
        "Lower bounds by a model (see benchmarks/gpu_cost_model/model.py). No GPU was used and no speed is claimed. "
        "*: the path that the tile table chooses."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"estimates_only": True, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
