"""python -m benchmarks.gpu_host: the host's cost of one call of a GPU layer, with Triton's launcher replaced.

Needs no GPU: kernels are compiled for compute capability 9.0 and given to a launcher that does nothing. All else is as
served. So the time of Triton's C launcher and of the driver is missing: some microseconds for each launch. With a GPU
`python -m benchmarks.gpu_linear` measures the whole call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common.command import one_line_errors
from benchmarks.common.files import write_results
from benchmarks.common.machine import load, machine, versions
from benchmarks.gpu_host.layers import WAYS, Layer, built
from benchmarks.gpu_host.report import markdown
from benchmarks.models.shapes import GPU_LAYERS

TOKENS = (1, 16, 2048)
# Each round takes a median of each way in turn. The least median is kept, since other jobs only add time.
ROUNDS, CALLS = 9, 200


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_host", description=__doc__)
    top.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="numbers of tokens")
    top.add_argument("--layers", nargs="+", default=["qkv", "gate_up", "down"], choices=list(GPU_LAYERS))
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu_host"), help="results directory")
    return top


def median_us(call: Callable[[], object]) -> float:
    """Median time of a call, in microseconds."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def python_calls(call: Callable[[], object]) -> int:
    """Number of Python functions that a call enters."""
    found = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    # The lambda around the call does not count.
    return found - 1


def measure(layer: Layer, tokens: int) -> dict[str, Any]:
    """Launches of one call, and by each way its time and its number of Python functions."""
    calls = {way: layer.call(way, tokens) for way in WAYS}
    row: dict[str, Any] = {"layer": layer.name, "two_level": layer.two_level, "M": tokens}
    row["launches"] = layer.launches(calls["bound"])
    medians: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, call in calls.items():
            medians[way].append(median_us(call))
    for way, call in calls.items():
        row[way] = {"us": min(medians[way]), "python_calls": python_calls(call)}
    return row


def main() -> None:
    """Measure, print, and keep the JSON."""
    arguments = parser().parse_args()
    rows = []
    with built(arguments.layers) as layers:
        for layer in layers:
            rows += [measure(layer, tokens) for tokens in arguments.tokens]
    result = {"machine": machine(), "versions": versions()} | load() | {"rows": rows}
    write_results(arguments.results, "sm_90", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    with one_line_errors():
        main()
