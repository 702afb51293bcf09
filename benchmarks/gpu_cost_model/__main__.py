"""python -m benchmarks.gpu_cost_model: estimate the GPU kernels' times without a GPU. Estimates, not measurements."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.command import one_line_errors
from benchmarks.models.shapes import GPU_LAYERS, GPU_TOKENS
from morphoquant_vllm.numerics.limits import GROUP_SIZES

if TYPE_CHECKING:
    from morphoquant_vllm.gpu.tiles import Tile
    from morphoquant_vllm.gpu.tools.binary_resources import Resources


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cost_model", description=__doc__)
    top.add_argument("--gpus", nargs="+", default=["L20", "A100", "H100"], choices=["L20", "A100", "H100"])
    top.add_argument("--group-size", type=int, default=32, choices=GROUP_SIZES)
    top.add_argument("--tokens", type=int, nargs="+", default=list(GPU_TOKENS), help="numbers of tokens")
    top.add_argument("--two-level", action="store_true", help="of layers with two-level scales")
    top.add_argument("--json", type=Path, help="write the estimates here, too")
    return top


@cache
def compiled(architecture: str, tile: Tile, group_size: int, partial: bool) -> Resources:
    """What the matrix kernel uses, compiled for a tile."""
    from morphoquant_vllm.gpu.tools import aot_compile as ahead
    from morphoquant_vllm.gpu.tools.binary_resources import resources

    return resources(ahead.build_gemm(architecture, tile, group_size, partial=partial))


def main() -> None:
    """Compile the shipped tiles, estimate, print."""
    arguments = parser().parse_args()
    if min(arguments.tokens) < 1:
        parser().error("--tokens must be positive")
    from rich.console import Console
    from rich.table import Table

    from benchmarks.gpu_cost_model.gpus import GPUS
    from benchmarks.gpu_cost_model.model import estimate, turn_channels
    from morphoquant_vllm.gpu import tiles
    from morphoquant_vllm.gpu.tools.occupancy import programs_per_unit

    console = Console(width=120)
    rows = []
    for gpu in (GPUS[name] for name in arguments.gpus):
        architecture = tiles.architectures()[gpu.architecture]
        title = f"ESTIMATES, nothing measured: {gpu.name}, G = {arguments.group_size}, times in microseconds"
        table = Table(title=title + ", two-level scales" * arguments.two_level)
        for heading in ("layer", "N x K", "M", "splits", "bandwidth", "issue", "tensor cores", "limit", "waves"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        table.add_column("estimate", justify="right")
        table.add_column("bf16 roofline", justify="right")
        for layer, (out_features, in_features) in GPU_LAYERS.items():
            for tokens in arguments.tokens:
                tile = architecture.tile(tokens, arguments.group_size, arguments.two_level)
                # An even number with two-level scales, which take two steps a turn.
                width = 1 + arguments.two_level
                steps = width * -(-in_features // turn_channels(arguments.group_size, arguments.two_level))
                splits = tiles.splits_of(tile, tokens, out_features, steps, gpu.units)
                used = compiled(gpu.architecture, tile, arguments.group_size, splits > 1)
                fitting = programs_per_unit(used, architecture)
                found = estimate(
                    gpu, tile, splits, used, fitting, tokens, out_features, in_features, arguments.group_size
                )
                shape = {"gpu": gpu.name, "layer": layer, "N": out_features, "K": in_features, "M": tokens}
                shape["two_level"] = arguments.two_level
                rows.append(shape | {"estimate": True, "limit": found.limit} | asdict(found))
                times = [found.bandwidth, found.issue, found.units]
                table.add_row(
                    layer,
                    f"{out_features}x{in_features}",
                    str(tokens),
                    str(splits),
                    *(f"{1e6 * time:.1f}" for time in times),
                    found.limit,
                    f"{found.waves:.2f}",
                    f"~{1e6 * found.seconds:.1f}",
                    f"~{1e6 * found.bfloat16:.1f}",
                )
        console.print(table)
    console.print(
        "Lower bounds by a model (see benchmarks/gpu_cost_model/model.py). No GPU was used and no speed is claimed."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"estimates_only": True, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
