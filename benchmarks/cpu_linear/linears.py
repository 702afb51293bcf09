"""Times of linear layers and of heads on one number of threads, every way in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cpu_linear.measure import interleaved
from benchmarks.cpu_linear.ways.heads import HEADS, head_bytes, heads
from benchmarks.cpu_linear.ways.peers import Linear, linears


def weight_bytes(outputs: int, channels: int, group_sizes: Sequence[int]) -> dict[str, float]:
    """Bytes of a layer's weights and scales, by way."""
    half = outputs * channels / 2
    found = {
        "oneDNN bf16": 4 * half,
        "torch bf16": 4 * half,
        "oneDNN W8A8": 2 * half,
        "W4A16 cpu_gemm_wna16": half * (1 + 4 / 128),
        "zentorch W8A8": 2 * half,
        "zentorch W4A8": half * (1 + 4 / 128),
        "zentorch W4A16": half * (1 + 4 / 128),
    }
    found |= {f"MorphoQuant G={size}": half * (1 + 4 / size) for size in group_sizes}
    return found | {f"MorphoQuant G={size} two-level": half * (1 + 2 / size) for size in group_sizes}


def measure(
    threads: int,
    layers: Mapping[str, tuple[int, int]],
    group_sizes: Sequence[int],
    tokens: Sequence[int],
    seconds: float,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One entry for each of `layers`, [N, K] by name, and why a way is left out. Sets torch's number of threads."""
    return _measured(
        threads,
        layers,
        lambda outputs, channels: linears(outputs, channels, list(group_sizes), max(tokens)),
        lambda outputs, channels: weight_bytes(outputs, channels, group_sizes),
        tokens,
        seconds,
    )


def measure_heads(threads: int, tokens: Sequence[int], seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """One entry for each of HEADS, as `measure`."""
    return _measured(threads, HEADS, heads, head_bytes, tokens, seconds)


def _measured(
    threads: int,
    layers: Mapping[str, tuple[int, int]],
    make: Callable[[int, int], tuple[dict[str, Linear], list[str]]],
    size: Callable[[int, int], dict[str, float]],
    tokens: Sequence[int],
    seconds: float,
) -> tuple[list[dict[str, Any]], list[str]]:
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    left_out: dict[str, None] = {}
    for name, (outputs, channels) in layers.items():
        ways, reasons = make(outputs, channels)
        left_out.update(dict.fromkeys(reasons))
        shape = {"layer": name, "outputs": outputs, "channels": channels, "threads": threads}
        found.append(_timed(shape, ways, size(outputs, channels), tokens, seconds))
    return found, list(left_out)


def _timed(
    shape: dict[str, Any], ways: Mapping[str, Linear], taken: Mapping[str, float], tokens: Sequence[int], seconds: float
) -> dict[str, Any]:
    """`shape` with the times of every way at each number of tokens."""
    points = []
    for count in tokens:
        x = torch.randn(count, shape["channels"]).bfloat16()
        times = interleaved({way: partial(run, x) for way, run in ways.items()}, seconds)
        points.append({"tokens": count, "times": times, "weight_bytes": {way: taken[way] for way in ways}})
        line = ", ".join(f"{way} {time['median'] * 1e6:.0f} µs" for way, time in times.items())
        print(f"{shape['layer']} M={count} threads={shape['threads']}: {line}", flush=True)
    return shape | {"points": points}
