"""python -m benchmarks.cpu_experts: the CPU kernels of routed experts against vLLM's `cpu_fused_moe` in bf16.

One layer of Qwen3-Omni-30B-A3B, with generated weights. The experts of each call are drawn anew, so their weights come
from memory. Needs 5 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.command import one_line_errors
from morphoquant_vllm.numerics.limits import GROUP_SIZES

if TYPE_CHECKING:
    from benchmarks.models.routed import Layer

TOKENS = (1, 4, 64, 512)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.cpu_experts", description=__doc__)
    top.add_argument("what", nargs="?", choices=("run", "report"), default="run", help="report: write the files again")
    top.add_argument("--tokens", nargs="+", type=int, metavar="M", default=list(TOKENS))
    top.add_argument("--threads", type=int, default=2)
    top.add_argument("--group-sizes", nargs="+", type=int, choices=GROUP_SIZES, default=[32])
    top.add_argument("--seconds", type=float, default=20.0, help="for each M; at least 15 rounds")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu_experts"))
    top.add_argument("--name", default="cpu_experts", help="of the files")
    return top


def run(arguments: argparse.Namespace, command: str, layer: Layer) -> dict[str, Any]:
    """Measure; the JSON object."""
    from benchmarks.common.machine import load, machine, torch_threads, versions
    from benchmarks.cpu_experts.measure import measure
    from benchmarks.cpu_experts.ways import bfloat16_isa, ways
    from morphoquant_vllm.cpu import build as cpu_build
    from morphoquant_vllm.errors import MorphoQuantError

    kernels = cpu_build.kernels()
    if kernels is None:
        raise MorphoQuantError("the CPU kernels do not run here; the warning above says why")
    started, busy = time.monotonic(), load()
    isa = bfloat16_isa()
    print(f"{machine()}; ours {kernels.instructions}, vLLM's isa {isa}; load {busy['load']:.1f}", flush=True)
    with torch_threads(arguments.threads):
        made = ways(layer, isa, arguments.group_sizes, max(arguments.tokens))
        points = measure(made, layer, arguments.tokens, arguments.seconds)
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "instructions": kernels.instructions,
        "isa": isa,
        **busy,
        "threads": arguments.threads,
        # Threads that sleep while they wait leave the cores of a busy machine to others, and get them back sooner.
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "layer": asdict(layer),
        "bytes": {name: way.size for name, way in made.items()},
        "points": points,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Measure, write the files, print their paths."""
    arguments = parser().parse_args()
    with one_line_errors():
        from benchmarks.common.files import read_result
        from benchmarks.cpu_experts.report import write
        from benchmarks.models.routed import QWEN3_OMNI

        if arguments.what == "report":
            summary = read_result(arguments.results, arguments.name)
        else:
            summary = run(arguments, shlex.join(["python", "-m", "benchmarks.cpu_experts", *sys.argv[1:]]), QWEN3_OMNI)
        for path in write(summary, arguments.results, arguments.name):
            print(path)


if __name__ == "__main__":
    main()
