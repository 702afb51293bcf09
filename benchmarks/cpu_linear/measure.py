"""Interleaved timing: every implementation is timed once in each round, so all see the same disturbances."""

from __future__ import annotations

import mmap
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.cpu_linear.layers import ROWS, generated
from morphoquant_vllm import ops
from morphoquant_vllm.cpu import backend as cpu


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    budget: float,
    least: int = 15,
    clock: Callable[[Callable[[], Any]], float] = timed,
) -> dict[str, dict[str, float]]:
    """Median and quartiles (s) of each, over rounds of one call each in random order, within `budget` s.

    `clock` gives the seconds of a call.
    """
    order = list(runs)
    shuffle = random.Random(0)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in order}
    started = time.perf_counter()
    while len(times[order[0]]) < least or (
        time.perf_counter() - started < budget and len(times[order[0]]) < 100 * least
    ):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(clock(runs[name]))
    found = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        found[name] = {"median": median, "low": low, "high": high, "runs": len(taken)}
    return found


def rows_cost(outputs: int, channels: int, group_size: int, tokens: int, pairs: int) -> dict[str, float]:
    """The cost of mixed modality rows relative to one row for all tokens, as a ratio of times.

    Paired runs in alternating order; the ratio is of medians, its interval a 95 % bootstrap over pairs. With one
    token, "mixed" means that the row changes from run to run.
    """
    weight, activation = cpu.prepare(*generated(outputs, channels, group_size, 1))
    x = torch.randn(tokens, channels).bfloat16()
    single = torch.zeros(tokens, dtype=torch.int32)
    taken: list[tuple[float, float]] = []
    for index in range(pairs + 5):
        mixed = (torch.arange(tokens) + index).int() % (ROWS - 1)
        modalities = [single, mixed]
        order = (0, 1) if index % 2 else (1, 0)
        pair = [0.0, 0.0]
        for kind in order:
            rows = modalities[kind]
            pair[kind] = timed(lambda rows=rows: ops.linear(x, rows, weight, activation, None, "cpu"))
        if index >= 5:
            taken.append((pair[0], pair[1]))

    def ratio(sample: list[tuple[float, float]]) -> float:
        return statistics.median(pair[1] for pair in sample) / statistics.median(pair[0] for pair in sample)

    draw = random.Random(0)
    drawn = sorted(ratio(draw.choices(taken, k=len(taken))) for _ in range(1000))
    return {
        "pairs": len(taken),
        "single": statistics.median(pair[0] for pair in taken),
        "mixed": statistics.median(pair[1] for pair in taken),
        "ratio": ratio(taken),
        "low": drawn[25],
        "high": drawn[974],
    }


def pages_cost(outputs: int, channels: int, group_size: int, tokens: int, pairs: int) -> dict[str, float]:
    """The cost of weights in pages of 4 KiB relative to the kernels' large pages: medians (s) of alternating calls."""
    (block, bias), activation = cpu.prepare(*generated(outputs, channels, group_size, 1))
    own = mmap.mmap(-1, block.numel(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own.madvise(mmap.MADV_NOHUGEPAGE)
    small = torch.frombuffer(own, dtype=torch.uint8).copy_(block)
    x, modality = torch.randn(tokens, channels).bfloat16(), torch.zeros(tokens, dtype=torch.int32)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for times, weights in zip(taken, (small, block), strict=True):
            times.append(
                timed(lambda weights=weights: ops.linear(x, modality, [weights, bias], activation, None, "cpu"))
            )
    medians = [statistics.median(times) for times in taken]
    return {"pairs": pairs, "small": medians[0], "large": medians[1], "ratio": medians[0] / medians[1]}
