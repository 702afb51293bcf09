"""The authors' activation quantizer (arXiv 2606.04349), per input channel, static.

This is the oracle: it reproduces every range, mask and output of the golden files. `activation.py` serves integer
hardware with the ranges and masks of this module. All tensors are float32 if no dtype is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from morphoquant_vllm.numerics.statistics import ChannelStatistics

CODE_MIN, CODE_MAX = -8, 7
LEVELS = CODE_MAX - CODE_MIN
# Smallest width of a range: keeps the inverse step of a dead channel finite.
MIN_RANGE_WIDTH = 1e-8
SEARCH_RATIOS = 15
EMA_MOMENTUM = 0.5


def dispersion_score(statistics: ChannelStatistics) -> Tensor:
    """Dispersion of each channel [K]: (max - min) / log1p(mean|x| + 1e-5); high for long-tailed channels."""
    return (statistics.maximum - statistics.minimum) / torch.log1p(statistics.abs_mean + 1e-5)


def outlier_mask(dispersion: Tensor, tau: float = 2.0) -> Tensor:
    """Channels whose dispersion lies `tau` (unbiased) standard deviations above the mean, bool [K]."""
    return dispersion >= dispersion.mean() + tau * dispersion.std()


def base_range(minimum: Tensor, maximum: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper edge of the range before the search, ([K], [K]).

    Two-sided channels get [-a, a]: a is the nearer edge if the channel is masked, else the farther edge. One-sided
    channels keep [minimum, maximum].
    """
    edges = torch.stack((minimum.abs(), maximum.abs()))
    alpha = torch.where(mask, edges.amin(0), edges.amax(0))
    two_sided = minimum * maximum <= 0
    return torch.where(two_sided, -alpha, minimum), torch.where(two_sided, alpha, maximum)


def escape_limit(range_min: Tensor, range_max: Tensor, lam: float = 0.8) -> Tensor:
    """Magnitude [K] above which a masked channel's value bypasses the grid: lam * max(|range|)."""
    return lam * torch.maximum(range_min.abs(), range_max.abs())


def inverse_step(range_min: Tensor, range_max: Tensor) -> Tensor:
    """Grid steps per unit, [K]: 15 / (range width, at least 1e-8)."""
    return LEVELS / (range_max - range_min).clamp(min=MIN_RANGE_WIDTH)


def zero_point(range_min: Tensor, inverse: Tensor) -> Tensor:
    """Integer offset of the grid, [K], as a float: round(inverse * range_min) + 8."""
    return torch.round(inverse * range_min) - CODE_MIN


def fake_quantize(x: Tensor, range_min: Tensor, range_max: Tensor) -> Tensor:
    """x [M, K] rounded to the 4-bit grid of each channel and back (round half to even)."""
    inverse = inverse_step(range_min, range_max)
    offset = zero_point(range_min, inverse)
    codes = torch.clamp(torch.round(inverse * x - offset), CODE_MIN, CODE_MAX)
    return (codes + offset) / inverse


def exact_quantize(x: Tensor, range_min: Tensor, range_max: Tensor, mask: Tensor, lam: float = 0.8) -> Tensor:
    """x [M, K] on the 4-bit grid; masked values beyond the limit stay unchanged (DABC with a 16-bit bypass)."""
    bypass = mask & (x.abs() > escape_limit(range_min, range_max, lam))
    return torch.where(bypass, x, fake_quantize(x, range_min, range_max))


def search_ratios(lower: float = 0.6) -> Tensor:
    """The candidate shrink ratios of the range, ascending from `lower` to 1, [15]."""
    return torch.logspace(math.log10(lower), 0, SEARCH_RATIOS)


def channel_score(
    x: Tensor,
    quantized: Tensor,
    lp_norm: float = 2.0,
    cosine_weight: float | None = None,
    token_weight: Tensor | None = None,
) -> Tensor:
    """Score of each channel [K], higher is better: -mean|quantized - x|^p, plus cosine_weight * cosine over tokens.

    x, quantized [M, K]; token_weight [M] sums to 1 and replaces the plain mean (the cosine stays unweighted).
    """
    error = (quantized - x).abs().pow(lp_norm)
    score = -error.mean(0) if token_weight is None else -(token_weight[:, None] * error).sum(0)
    if cosine_weight is None:
        return score
    cosine = torch.nn.functional.cosine_similarity(quantized, x, dim=0, eps=1e-6).clamp(-1, 1)
    return score + cosine_weight * cosine


def search_scores(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    mask: Tensor,
    *,
    lower: float = 0.6,
    lam: float = 0.8,
    lp_norm: float = 2.0,
    cosine_weight: float | None = None,
    token_weight: Tensor | None = None,
) -> Tensor:
    """Scores of every candidate range on one batch, [15, K] (MDQFO: grid and bypass are judged together)."""
    return torch.stack(
        [
            channel_score(
                x, exact_quantize(x, ratio * low, ratio * high, mask, lam), lp_norm, cosine_weight, token_weight
            )
            for ratio in search_ratios(lower)
        ]
    )


def merge_scores(old: Tensor | None, new: Tensor) -> Tensor:
    """Update the reference's moving average over batches; the first batch is taken unchanged."""
    return new if old is None else EMA_MOMENTUM * old + (1 - EMA_MOMENTUM) * new


def best_ratio(scores: Tensor, lower: float = 0.6) -> Tensor:
    """The winning ratio of each channel [K]; the smallest of equal ones."""
    return search_ratios(lower)[scores.argmax(0)]
