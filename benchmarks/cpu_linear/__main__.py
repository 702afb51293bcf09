"""python -m benchmarks.cpu_linear: the CPU kernels against vLLM's linears and head, and against each other.

Also the cost of modality rows and of small pages.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common.command import one_line_errors
from benchmarks.cpu_linear.layers import MODELS
from morphoquant_vllm.numerics.limits import GROUP_SIZES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
# The layer and the tokens at which the cost of rows and of pages is asked for.
ROWS_SHAPE, ROWS_TOKENS = (18944, 3584), (1, 128)
# The tokens at which instruction sets are compared, on the same layer.
INSTRUCTIONS_TOKENS = (1, 4, 16, 128)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.cpu_linear", description=__doc__)
    what = ("linears", "heads", "rows", "pages", "instructions", "all", "report")
    top.add_argument("what", nargs="?", choices=what, default="all", help="report: write a kept result's files again")
    top.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["bars"])
    top.add_argument("--layers", nargs="+", help="only layers with these names, such as down")
    top.add_argument("--tokens", nargs="+", type=int, metavar="M", help="several numbers each by default")
    top.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    top.add_argument("--group-sizes", nargs="+", type=int, choices=GROUP_SIZES, default=[32, 128])
    top.add_argument("--seconds", type=float, default=1.0, help="for each layer, M and number of threads")
    top.add_argument("--pairs", type=int, default=200, help="of calls whose cost is compared")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu_linear"))
    top.add_argument("--name", default="cpu_linear", help="of the files")
    return top


def measure_linears(arguments: argparse.Namespace, left_out: dict[str, None]) -> list[dict[str, Any]]:
    """One entry for each layer and number of threads."""
    from benchmarks.cpu_linear.linears import measure

    chosen = {
        f"{model} {name}": shape
        for model in arguments.models
        for name, shape in MODELS[model].items()
        if not arguments.layers or name in arguments.layers
    }
    settings = (chosen, arguments.group_sizes, arguments.tokens or TOKENS, arguments.seconds)
    return _on_threads(arguments.threads, left_out, measure, settings)


def measure_heads(arguments: argparse.Namespace, left_out: dict[str, None]) -> list[dict[str, Any]]:
    """One entry for each head and number of threads."""
    from benchmarks.cpu_linear.linears import measure_heads as measure
    from benchmarks.cpu_linear.ways.heads import TOKENS as HEAD_TOKENS

    return _on_threads(arguments.threads, left_out, measure, (arguments.tokens or HEAD_TOKENS, arguments.seconds))


def _on_threads(
    threads: list[int],
    left_out: dict[str, None],
    measure: Callable[..., tuple[list[dict[str, Any]], list[str]]],
    settings: tuple[Any, ...],
) -> list[dict[str, Any]]:
    found = []
    for number in threads:
        if len(threads) == 1:
            cases, reasons = measure(number, *settings)
        else:
            # oneDNN keeps the number of threads of its first call, for layers made later, too.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                cases, reasons = process.submit(measure, number, *settings).result()
        found += cases
        left_out.update(dict.fromkeys(reasons))
    return found


def measure_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The cost of mixed rows, for each number of threads and each of ROWS_TOKENS."""
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
    """The cost of small pages, for each number of threads and each of ROWS_TOKENS."""
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


def measure_instructions(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The times of each instruction set, for each number of threads and of tokens."""
    from benchmarks.cpu_linear.instructions import measure

    tokens = tuple(arguments.tokens or INSTRUCTIONS_TOKENS)
    layer = (*ROWS_SHAPE, arguments.group_sizes[0])
    return [case for threads in arguments.threads for case in measure(threads, *layer, tokens, arguments.seconds)]


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure; the JSON object."""
    from benchmarks.common.machine import load, machine, versions
    from benchmarks.cpu_linear.peak import ceilings
    from morphoquant_vllm.cpu import build as cpu_build
    from morphoquant_vllm.errors import MorphoQuantError

    kernels = cpu_build.kernels()
    if kernels is None:
        raise MorphoQuantError("the CPU kernels do not run here; the warning above says why")
    started, busy = time.monotonic(), load()
    left_out: dict[str, None] = {}
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "instructions": kernels.instructions,
        **busy,
        "ceilings": {str(threads): ceilings(threads) for threads in arguments.threads},
        "linears": measure_linears(arguments, left_out) if arguments.what in ("linears", "all") else [],
        "heads": measure_heads(arguments, left_out) if arguments.what in ("heads", "all") else [],
        "rows": measure_rows(arguments) if arguments.what in ("rows", "all") else [],
        "pages": measure_pages(arguments) if arguments.what in ("pages", "all") else [],
        "instruction_sets": measure_instructions(arguments) if arguments.what in ("instructions", "all") else [],
        "left_out": list(left_out),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Measure, write the files, print their paths."""
    arguments = parser().parse_args()
    with one_line_errors():
        from benchmarks.common.files import read_result
        from benchmarks.cpu_linear.report import write

        if arguments.what == "report":
            summary = read_result(arguments.results, arguments.name)
        else:
            summary = run(arguments, "python -m benchmarks.cpu_linear " + shlex.join(sys.argv[1:]))
        for path in write(summary, arguments.results, arguments.name):
            print(path)


if __name__ == "__main__":
    main()
