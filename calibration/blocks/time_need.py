"""Estimates the time for a decoder's blocks on a CPU: operations from sizes alone, over this machine's speed.

    M   tokens of all samples            T   drawn tokens
    K   in_features of a distinct input  N   out_features of all linears that read it

    4 M N K      the products of the two streams
    2 T K^2      the second moments, with 4/3 K^3 for their factorisation
    N K^2        the rounding
    50,000 T K   search and fits, which go over the drawn values many times
    4 (4 N K^2 + 1/3 K^3)   the regressions between which held-out samples choose (effort default and best)
    3 N K^2      one more rounding, and the errors of both (effort best)

Attention, reading the model's files and hidden states on disk are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from calibration.quantize.served_weights import STRENGTHS
from morphoquant_vllm.format.layers import LayerSpec

# Operations of a product that take as long as search and fits for one drawn value. It was fitted to a measured block of
# 2048 channels; the demo's model of 576 channels confirms it (docs/results/calibration.md).
OPERATIONS_OF_A_VALUE = 50_000
# The product of the probe, M x N x K, and the seconds of all its repetitions.
PRODUCT = (512, 1024, 1024)
PROBE_SECONDS = 0.5


def operations(layers: Iterable[LayerSpec], tokens: int, drawn: int, effort: str = "fast") -> float:
    """Floating-point operations for the layers of all blocks, with `tokens` in all samples and `drawn` of them.

    `effort` is the recipe's if samples are held out, else `fast`.
    """
    inputs: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        inputs.setdefault(layer.shared_input, []).append(layer)
    total = 0.0
    for shards in inputs.values():
        k, n = shards[0].in_features, sum(layer.out_features for layer in shards)
        total += 4 * tokens * n * k + 2 * drawn * k**2 + 4 / 3 * k**3 + n * k**2 + OPERATIONS_OF_A_VALUE * drawn * k
        if effort != "fast":
            total += len(STRENGTHS) * (4 * n * k**2 + k**3 / 3)
        if effort == "best":
            total += 3 * n * k**2
    return total


def product_speed() -> float:
    """Floating-point operations in a second, in float32, of the fastest of many products on torch's threads."""
    tokens, out_features, in_features = PRODUCT
    x, weight = torch.ones(tokens, in_features), torch.ones(out_features, in_features)
    fastest, end = float("inf"), time.monotonic() + PROBE_SECONDS
    while time.monotonic() < end:
        started = time.perf_counter()
        torch.mm(x, weight.T)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * tokens * out_features * in_features / fastest
