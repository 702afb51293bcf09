"""The step and centre of every channel: the least error of the layer's output within the escape budget. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from morphoquant_vllm.numerics.activation import GUARD_CODES, Grid, code_limits, floor_dead
from morphoquant_vllm.numerics.reference import LEVELS, MIN_RANGE_WIDTH

# Candidate ranges, as fractions of the largest magnitude, evenly spaced in the logarithm. The smallest is the one at
# which 8-bit codes would saturate. The largest is a little more than 1: the largest value comes again with its token
# (a chat template's). At the very edge, code 7.5, float noise would round it up on one machine and down on another.
CANDIDATES = 20
LARGEST_RATIO = 1.02
SMALLEST_RATIO = LEVELS / (2 * GUARD_CODES)
# The middle of these quantiles of a channel is its centre, or 0 if it is within CENTRE_FLOOR times their distance.
CENTRE_QUANTILES = (0.01, 0.99)
CENTRE_TOKENS = 512
CENTRE_FLOOR = 0.05
BISECTIONS = 40
# Turns of balancing the modalities' prices, and the smallest factor by which a turn lowers one.
PRICE_TURNS = 8
LEAST_PRICE_FACTOR = 0.2


@dataclass(frozen=True)
class Losses:
    """The cost of each candidate range."""

    # Weighted mean square rounding error times the channel's importance, [CANDIDATES, K].
    error: Tensor
    # Share of codes outside [-8, 7] among each modality's tokens, [modalities, CANDIDATES, K].
    escape: Tensor


def centres(x: Tensor) -> Tensor:
    """Centre of each channel, float32 [K], from tokens x [tokens, K]: real-valued, or 0 for channels around 0."""
    stride = max(1, x.shape[0] // CENTRE_TOKENS)
    quantiles = torch.tensor(CENTRE_QUANTILES, device=x.device)
    low, high = torch.quantile(x[::stride][:CENTRE_TOKENS], quantiles, dim=0)
    middle = (low + high) / 2
    return torch.where(middle.abs() < CENTRE_FLOOR * (high - low), 0.0, middle)


def candidate_steps(farthest: Tensor) -> Tensor:
    """Candidate steps [CANDIDATES, K], descending, for channels that reach `farthest` [K] from their centre."""
    ratios = torch.logspace(math.log10(LARGEST_RATIO), math.log10(SMALLEST_RATIO), CANDIDATES, device=farthest.device)
    width = (farthest * 2).clamp(min=MIN_RANGE_WIDTH)
    return ratios[:, None] * width / LEVELS


def losses(
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], centre: Tensor, steps: Tensor, importance: Tensor, *, escapes: bool
) -> Losses:
    """Losses of the candidate `steps` [CANDIDATES, K] on chunks of tokens: x, weight, modality_share.

    x [tokens, K], weight [tokens]. modality_share [tokens, modalities]: share of a token in the mean over its
    modality's tokens, 0 in the columns of other modalities.
    importance [K]: squared norm of the channel's column of W. It turns an error of the channel into one of the output,
    if errors of different channels are uncorrelated. Without `escapes` codes are clipped to [-8, 7].
    """
    parts = list(parts)
    error, escape = torch.zeros_like(steps), steps.new_zeros(parts[0][2].shape[1], *steps.shape)
    low, high = (float(limit) for limit in code_limits(torch.tensor(escapes)))
    inner_low, inner_high = (float(limit) for limit in code_limits(torch.tensor(False)))
    for x, weight, modality_share in parts:
        distance = x - centre
        columns = modality_share.T.contiguous()
        for index, step in enumerate(steps):
            codes = (distance / step).round_()
            outside = ((codes < inner_low) | (codes > inner_high)).float()
            for own, column in zip(escape, columns, strict=True):
                own[index] += column @ outside
            difference = codes.clamp_(low, high).mul_(step).sub_(distance)
            error[index] += weight @ difference.square_()
    return Losses(error * importance, escape if escapes else torch.zeros_like(escape))


def choose(found: Losses, budget: float) -> Tensor:
    """The candidate of each channel, int64 [K]: least error with at most `budget` of any modality's codes escaping.

    A Lagrangian search: it bisects for the smallest price per escape, the same for the whole layer, that keeps the
    budget. So escapes go to the channels where they help most. With several modalities each has a price; PRICE_TURNS
    turns lower the prices of modalities whose codes escape less often than the others'.
    """
    price = torch.ones(found.escape.shape[0], device=found.error.device)
    best = chosen = _cheapest(found, torch.tensordot(price, found.escape, 1), budget)
    for _ in range(PRICE_TURNS if len(price) > 1 else 0):
        rates = _rates(found, chosen)
        price = price * (rates / rates.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=LEAST_PRICE_FACTOR)
        price = price / price.mean()
        chosen = _cheapest(found, torch.tensordot(price, found.escape, 1), budget)
        if float(_rates(found, chosen).max()) <= budget and _error(found, chosen) < _error(found, best):
            best = chosen
    return best


def _error(found: Losses, chosen: Tensor) -> float:
    return float(found.error.gather(0, chosen[None]).sum())


def _rates(found: Losses, chosen: Tensor) -> Tensor:
    """Escape rate of each modality, [modalities], with the candidates `chosen` [K]."""
    return found.escape[:, chosen, torch.arange(chosen.numel(), device=chosen.device)].mean(1)


def _cheapest(found: Losses, escape: Tensor, budget: float) -> Tensor:
    """Candidates [K] of least error at the smallest price of `escape` [CANDIDATES, K] that keeps the budget."""
    scale = found.error.mean().clamp(min=torch.finfo(torch.float32).tiny)
    low, high = -40.0, 40.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        chosen = (found.error / scale + math.exp(middle) * escape).argmin(0)
        within = float(_rates(found, chosen).max()) <= budget
        low, high = (low, middle) if within else (middle, high)
    return (found.error / scale + math.exp(high) * escape).argmin(0)


def budget_grid(
    parts: Iterable[tuple[Tensor, Tensor, Tensor]],
    centre: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    importance: Tensor,
    budget: float,
) -> Grid:
    """Step and centre of each channel: at most `budget` of any modality's codes escape; with 0, codes are clipped.

    `parts` as `losses` takes them. minimum, maximum [K]: of every token that the grid serves. If channels may escape,
    no value between them saturates, even with the smallest candidate. Dead channels get a floor.
    """
    farthest = torch.maximum((maximum - centre).abs(), (minimum - centre).abs())
    steps = candidate_steps(farthest)
    chosen = choose(losses(parts, centre, steps, importance, escapes=budget > 0), budget)
    step = steps.gather(0, chosen[None])[0]
    return Grid(floor_dead(step), centre, torch.ones_like(step))
