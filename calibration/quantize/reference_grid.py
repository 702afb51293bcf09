"""The reference's way to a grid: mask by dispersion, range by search (arXiv 2606.04349), then as integers serve it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from calibration.processes import ONE, Processes
from calibration.settings.recipe import Recipe
from morphoquant_vllm.numerics import activation, reference
from morphoquant_vllm.numerics.statistics import ChannelStatistics

# Fewer tokens than this say nothing about a channel's tail: with one token max - min is 0 on every channel, so that all
# of them (0 >= 0) are outliers, and with a few the mask is noise. Such a modality has no mask of its own.
MIN_MASK_TOKENS = 32


def reference_grid(
    modalities: Sequence[ChannelStatistics],
    pooled: ChannelStatistics,
    parts: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    full_mask: bool,
    processes: Processes = ONE,
) -> tuple[Tensor, activation.Grid]:
    """Mask bool [K] and grid of one input, from chunks (x [T, K], weight [T]) and statistics.

    `modalities`: of each, massive tokens apart; `pooled`: of every token that the grid serves. Each process has some of
    the chunks, and all have the same statistics.
    """
    mask = torch.ones_like(pooled.minimum, dtype=torch.bool) if full_mask else _mask(modalities, pooled, recipe)
    low, high = reference.base_range(pooled.minimum, pooled.maximum, mask)
    ratio = _search(parts, low, high, mask, recipe, processes)
    return mask, activation.served_grid(ratio * low, ratio * high, pooled.minimum, pooled.maximum, mask)


def _mask(modalities: Sequence[ChannelStatistics], pooled: ChannelStatistics, recipe: Recipe) -> Tensor:
    """Union of the modalities' masks, bool [K]; the pooled statistics' if no modality has enough tokens."""
    mask = torch.zeros_like(pooled.minimum, dtype=torch.bool)
    # A modality's outliers must be able to escape, however rare its tokens are beside the others'.
    for statistics in [each for each in modalities if each.tokens >= MIN_MASK_TOKENS] or [pooled]:
        dispersion = reference.dispersion_score(statistics)
        if recipe.dispersion_threshold is not None:
            mask |= dispersion >= recipe.dispersion_threshold
        # Without spread every channel lies at the mean, which is the threshold too: none stands out.
        elif float(dispersion.std()) > 0:
            mask |= reference.outlier_mask(dispersion, recipe.tau)
    return mask


def _search(
    parts: Iterable[tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    mask: Tensor,
    recipe: Recipe,
    processes: Processes,
) -> Tensor:
    """The winning ratio of each channel, [K].

    One weighted mean over all sampled tokens takes the place of the reference's moving average over batches: with
    several modalities that would mostly remember the last batches, whatever their modality.
    """
    scores = torch.zeros(reference.SEARCH_RATIOS, low.numel(), device=low.device)
    for x, weight in parts:
        # Errors are weighted by token; the cosine is one number for the chunk, which counts as much as its tokens.
        cosine = recipe.cosine_weight * float(weight.sum()) if recipe.cosine_weight else None
        scores += reference.search_scores(
            *(x, low, high, mask),
            lower=recipe.lower,
            lam=recipe.lam,
            lp_norm=recipe.lp_norm,
            cosine_weight=cosine,
            token_weight=weight,
        )
    return reference.best_ratio(processes.all_reduce(scores, "SUM").cpu(), recipe.lower).to(low.device)
