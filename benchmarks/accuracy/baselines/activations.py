"""Activation baselines: x [M, K] rounded to symmetric int4 and back, float32.

Scales are max|x| / 7.5 with codes in [-8, 7], as compressed-tensors computes them for vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.reference import CODE_MAX, CODE_MIN, LEVELS

# Weight columns or activation channels that are always 0 get this size in SmoothQuant, as in its authors' code.
SMOOTH_FLOOR = 1e-5


def scale_of(peak: Tensor) -> Tensor:
    """Scale of values of largest magnitude `peak`; positive even if that is 0."""
    return (peak / (LEVELS / 2)).clamp(min=torch.finfo(torch.float32).tiny)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x on the 4-bit grid of `scale` (broadcast)."""
    return torch.round(x / scale).clamp_(CODE_MIN, CODE_MAX) * scale


def per_token(x: Tensor, clip: float = 1.0) -> Tensor:
    """Dynamic: one scale per token, of `clip` times its largest magnitude."""
    return quantize(x, scale_of(clip * x.abs().amax(-1, keepdim=True)))


def per_token_group(x: Tensor, group_size: int) -> Tensor:
    """Dynamic: one scale per token and group of `group_size` channels; MorphoQuantError if K is not divisible."""
    if x.shape[-1] % group_size:
        raise MorphoQuantError(f"K = {x.shape[-1]} is not divisible by activation group size {group_size}")
    return per_token(x.unflatten(-1, (-1, group_size))).flatten(-2)


def channel_peak(inputs: Iterable[Tensor]) -> Tensor:
    """Largest magnitude of each channel [K] over the inputs [M, K]."""
    return reduce(torch.maximum, (x.abs().amax(0) for x in inputs))


def smoothing(channel_peaks: Tensor, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """SmoothQuant's divisors of the activation, [K]: peak(x)^alpha / peak(W)^(1 - alpha), over all of `weights`.

    (Xiao et al. 2022, arXiv 2211.10438; the weights that share the input share the divisors.)
    """
    weight_peaks = channel_peak(weights.values()).clamp(min=SMOOTH_FLOOR)
    ratio = channel_peaks.pow(alpha) / weight_peaks.pow(1 - alpha)
    return ratio.clamp(min=SMOOTH_FLOOR)
