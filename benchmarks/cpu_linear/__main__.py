"""python -m benchmarks.cpu_linear: the CPU kernels against vLLM's linears; cost of modality rows, of pages."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import one_line_errors
from benchmarks.cpu_linear.layers import MODELS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
# The layer and the tokens at which the cost of rows and of pages is asked for.
ROWS_SHAPE, ROWS_TOKENS = (18944, 3584), (1, 128)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.cpu_linear", description=__doc__)
    top.add_argument("what", nargs="?", choices=("linears", "rows", "pages", "all"), default="all")
    top.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["bars"])
    top.add_argument("--layers", nargs="+", help="only layers with these names, such as down")
    top.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M")
    top.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    top.add_argument("--group-sizes", nargs="+", type=int, choices=(32, 64, 128), default=[32, 128])
    top.add_argument("--seconds", type=float, default=1.0, help="for each layer, M and number of threads")
    top.add_argument("--pairs", type=int, default=200, help="of calls whose cost is compared")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu_linear"))
    top.add_argument("--name", default="cpu_linear", help="of the files")
    return top


def measure_linears(arguments: argparse.Namespace, left_out: dict[str, None]) -> list[dict[str, Any]]:
    """One entry for each layer and number of threads."""
    import torch

    from benchmarks.cpu_linear.measure import interleaved
    from benchmarks.cpu_linear.peers import linears

    chosen = {
        f"{model} {name}": shape
        for model in arguments.models
        for name, shape in MODELS[model].items()
        if not arguments.layers or name in arguments.layers
    }
    found = []
    for name, (outputs, channels) in chosen.items():
        half = outputs * channels / 2
        weight_bytes = {
            "oneDNN bf16": 4 * half,
            "torch bf16": 4 * half,
            "oneDNN W8A8": 2 * half,
            "W4A16 cpu_gemm_wna16": half * (1 + 4 / 128),
            "zentorch W8A8": 2 * half,
            "zentorch W4A8": half * (1 + 4 / 128),
            "zentorch W4A16": half * (1 + 4 / 128),
        }
        weight_bytes |= {f"MorphoQuant G={size}": half * (1 + 4 / size) for size in arguments.group_sizes}
        weight_bytes |= {f"MorphoQuant G={size} two-level": half * (1 + 2 / size) for size in arguments.group_sizes}
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            # Made anew: vLLM's oneDNN keeps its plan for each M, made for the number of threads of the first call.
            ways, reasons = linears(outputs, channels, arguments.group_sizes, max(arguments.tokens))
            left_out.update(dict.fromkeys(reasons))
            points = []
            for tokens in arguments.tokens:
                x = torch.randn(tokens, channels).bfloat16()
                times = interleaved({way: partial(run, x) for way, run in ways.items()}, arguments.seconds)
                points.append(
                    {"tokens": tokens, "times": times, "weight_bytes": {way: weight_bytes[way] for way in ways}}
                )
                print(f"{name} M={tokens} threads={threads}: " + _line(times), flush=True)
            found.append(
                {"layer": name, "outputs": outputs, "channels": channels, "threads": threads, "points": points}
            )
    return found


def _line(times: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {taken['median'] * 1e6:.0f} µs" for name, taken in times.items())


def measure_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What mixed rows cost, for each number of threads and each of ROWS_TOKENS."""
    import torch

    from benchmarks.cpu_linear.measure import rows_cost

    outputs, channels = ROWS_SHAPE
    group_size = arguments.group_sizes[0]
    found = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for tokens in ROWS_TOKENS:
            cost = rows_cost(outputs, channels, group_size, tokens, arguments.pairs)
            shape = {"outputs": outputs, "channels": channels, "group_size": group_size}
            found.append(shape | {"tokens": tokens, "threads": threads} | cost)
            print(f"rows M={tokens} threads={threads}: mixed / one row {cost['ratio']:.3f}", flush=True)
    return found


def measure_pages(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What small pages cost, for each number of threads and each of ROWS_TOKENS."""
    import torch

    from benchmarks.cpu_linear.measure import pages_cost

    outputs, channels = ROWS_SHAPE
    found = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for tokens in ROWS_TOKENS:
            shape = {"outputs": outputs, "channels": channels, "group_size": arguments.group_sizes[0], "tokens": tokens}
            cost = pages_cost(**shape, pairs=arguments.pairs)
            found.append(shape | {"threads": threads} | cost)
            print(f"pages M={tokens} threads={threads}: small / large {cost['ratio']:.2f}", flush=True)
    return found


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure; the JSON object."""
    from benchmarks.cpu_linear.peak import ceilings
    from benchmarks.machine import machine, versions
    from morphoquant_vllm import cpu_build
    from morphoquant_vllm.errors import MorphoQuantError

    kernels = cpu_build.kernels()
    if kernels is None:
        raise MorphoQuantError("the CPU kernels do not run here; the warning above says why")
    started, load = time.monotonic(), os.getloadavg()[0]
    left_out: dict[str, None] = {}
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "instructions": kernels.instructions,
        "load": load,
        # Others kept a core busy before this run began.
        "contended": load > 0.5,
        "ceilings": {str(threads): ceilings(threads) for threads in arguments.threads},
        "linears": measure_linears(arguments, left_out) if arguments.what in ("linears", "all") else [],
        "rows": measure_rows(arguments) if arguments.what in ("rows", "all") else [],
        "pages": measure_pages(arguments) if arguments.what in ("pages", "all") else [],
        "left_out": list(left_out),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Measure, write the files, say where they are."""
    arguments = parser().parse_args()
    with one_line_errors():
        from benchmarks.cpu_linear.report import write

        summary = run(arguments, "python -m benchmarks.cpu_linear " + shlex.join(sys.argv[1:]))
        for path in write(summary, arguments.results, arguments.name):
            print(path)


if __name__ == "__main__":
    main()
