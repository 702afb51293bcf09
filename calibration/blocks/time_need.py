"""Estimates the time for a decoder's blocks on a CPU: operations from sizes alone, over this machine's speed.

    M   tokens of all samples            T   drawn tokens
    K   in_features of a distinct input  N   out_features of all linears that read it

    4 M N K      the products of the two streams
    2 T K^2      the second moments, with 4/3 K^3 for their factorisation
    N K^2        the rounding
    50,000 T K   search and fits, which go over the drawn values many times

If inputs share a budget of the model, t tokens decide how, beforehand:

    6 t N K      the products of a pass forward and one back
    50,000 t K   the costs of each candidate step

With metrics of the outputs of some linears, of N outputs each, by t tokens:

    6 t N K              the products of a pass forward and one back, of all linears
    2 t N^2 + 5/3 N^3    the moments, and the factors of the metrics
    N^2 K                the errors that later outputs compensate for

For E experts, C of which a token chooses. K and I are the channels of hidden states and of an expert's inner input.
The drawn tokens of one expert are t = T C / E. The first two lines are of all experts together, the others of each.

    12 M C I K   the products of the two streams
    2 T K^2 + 4/3 K^3 + 50,000 T K   moments, factor and search of the input that gate and up share, as above
    5/2 t (K^2 + I^2) + 5/3 (K^3 + I^3)   moments, and factors for regression and rounding
    22 (2 I K) K + 22 (I K) I   products of weights and moments in regression, rounding and fits
    8 t (2 I K) + 4 t (I K)     errors, and the input of down
    90,000 (3 I K)              the search of codes and scales, which goes over the weights many times

Attention, reading the model's files and hidden states on disk are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch

from calibration.quantize.output_metric import with_metric
from morphoquant_vllm.format.layers import ExpertsSpec, LayerSpec

# Operations of a product that take as long as search and fits for one drawn value. It was fitted to a measured block of
# 2048 channels; the demo's model of 576 channels took less (docs/results/calibration.md).
OPERATIONS_OF_A_VALUE = 50_000
# The same for one weight of an expert and the search of its code. It was fitted to a measured block of 128 experts
# (docs/results/calibration.md).
OPERATIONS_OF_A_WEIGHT = 90_000
# Operations for one weight of an expert and one channel of its input: products of weights and second moments. They are
# counted in moments, rounding, group_search and scale_fit of calibration.quantize.
OPERATIONS_OF_A_PRODUCT = 22
# The product of the probe, M x N x K, and the seconds of all its repetitions. It takes a millisecond, so a busy machine
# does not interrupt all of them.
PRODUCT = (256, 512, 512)
PROBE_SECONDS = 0.5


def operations(layers: Iterable[LayerSpec], tokens: int, drawn: int) -> float:
    """Floating-point operations for the layers of all blocks, with `tokens` in all samples and `drawn` of them."""
    inputs: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        inputs.setdefault(layer.shared_input, []).append(layer)
    total = 0.0
    for shards in inputs.values():
        k, n = shards[0].in_features, sum(layer.out_features for layer in shards)
        total += 4 * tokens * n * k + 2 * drawn * k**2 + 4 / 3 * k**3 + n * k**2 + OPERATIONS_OF_A_VALUE * drawn * k
    return total


def sharing_operations(layers: Iterable[LayerSpec], tokens: int) -> float:
    """Floating-point operations of the stage that shares a budget among inputs by `tokens` tokens."""
    found = list(layers)
    channels = {layer.shared_input: layer.in_features for layer in found}
    products = sum(layer.in_features * layer.out_features for layer in found)
    return float(tokens * (6 * products + OPERATIONS_OF_A_VALUE * sum(channels.values())))


def metric_operations(layers: Mapping[str, LayerSpec], tokens: int) -> float:
    """Floating-point operations of the metrics of outputs by `tokens` tokens, and of rounding with them, by layer."""
    products = 6 * tokens * sum(layer.in_features * layer.out_features for layer in layers.values())
    total = float(products)
    for layer in with_metric(layers).values():
        total += (2 * tokens + layer.in_features + 5 / 3 * layer.out_features) * layer.out_features**2
    return total


def experts_operations(experts: ExpertsSpec, chosen: int, tokens: int, drawn: int) -> float:
    """Floating-point operations for the experts of one block, `chosen` of which each token chooses."""
    k, inner = experts.in_features, experts.intermediate_features
    own = drawn * chosen / experts.count
    shared = 2 * drawn * k**2 + 4 / 3 * k**3 + OPERATIONS_OF_A_VALUE * drawn * k
    each = 0.0
    # Inputs, weights, and products with each token for errors and for the input of down.
    for channels, weights, products in ((k, 2 * inner * k, 8), (inner, inner * k, 4)):
        each += 5 / 2 * own * channels**2 + 5 / 3 * channels**3
        each += weights * (OPERATIONS_OF_A_PRODUCT * channels + products * own + OPERATIONS_OF_A_WEIGHT)
    return 12 * tokens * chosen * inner * k + shared + experts.count * each


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
