"""Interleaved timing with fresh routing: in each round every way computes the same tokens, routed as never before."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from benchmarks.cpu_experts.ways import Way
from benchmarks.models.routed import Layer, routing


def timed(
    ways: Mapping[str, Way], layer: Layer, tokens: int, seconds: float, least: int = 15
) -> dict[str, dict[str, float]]:
    """Median and quartiles (s) of each way, over rounds of one call each in random order, within `seconds`.

    A round has fresh tokens and fresh routing, the same for every way. So the next call reads other experts, and
    between two calls of a way all others have read their weights.
    """
    order, shuffle = list(ways), random.Random(0)
    generator = torch.Generator().manual_seed(tokens)
    times: dict[str, list[float]] = {name: [] for name in order}
    started, warm = time.perf_counter(), False
    while len(times[order[0]]) < least or time.perf_counter() - started < seconds:
        x = torch.randn(tokens, layer.hidden, generator=generator).bfloat16()
        given = (x, *routing(tokens, layer, generator))
        shuffle.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            ways[name].run(*given)
            if warm:
                times[name].append(time.perf_counter() - begun)
        warm = True
    found = {}
    for name in ways:
        low, median, high = statistics.quantiles(times[name], n=4)
        found[name] = {"median": median, "low": low, "high": high, "runs": len(times[name])}
    return found


def measure(ways: Mapping[str, Way], layer: Layer, tokens: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """One entry for each number of tokens: the times of every way, the experts that a call reads on average, and the
    cores that other processes took meanwhile."""
    points = []
    for count in tokens:
        before, started = _others(), time.perf_counter()
        times = timed(ways, layer, count, seconds)
        others = max(_others() - before, 0.0) / (time.perf_counter() - started)
        read = layer.experts * (1 - (1 - layer.chosen / layer.experts) ** count)
        points.append({"tokens": count, "experts_read": read, "others": others, "times": times})
        line = ", ".join(f"{way} {time['median'] * 1e3:.2f} ms" for way, time in times.items())
        print(f"M={count}: {line}; other processes took {others:.2f} cores", flush=True)
    return points


def _others() -> float:
    """Seconds of processor time that other processes, and other guests of the host, have taken so far."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return float(sum(machine) - machine.idle - machine.iowait - own.user - own.system)
