"""The authors' search of a grid (arXiv 2606.04349): mask by dispersion, then range; converted to the served form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from calibration.processes import ONE, Processes
from calibration.settings.recipe import Recipe
from morphoquant_vllm.numerics import activation, reference
from morphoquant_vllm.numerics.statistics import ChannelStatistics

# With fewer tokens the tail of a channel is unknown, so the modality adds nothing to the mask. With one token max - min
# is 0 on every channel, so all of them (0 >= 0) would be outliers. With a few the mask would be noise.
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
    """Mask bool [K] and grid of one input, from chunks (x [tokens, K], weight [tokens]) and statistics.

    `modalities`: statistics of each modality without massive tokens. `pooled`: of every token that the grid serves.
    Each process has some of the chunks, and all have the same statistics.
    """
    mask = torch.ones_like(pooled.minimum, dtype=torch.bool) if full_mask else _mask(modalities, pooled, recipe)
    low, high = reference.base_range(pooled.minimum, pooled.maximum, mask)
    ratio = _search(parts, low, high, mask, recipe, processes)
    return mask, activation.served_grid(ratio * low, ratio * high, pooled.minimum, pooled.maximum, mask)


def _mask(modalities: Sequence[ChannelStatistics], pooled: ChannelStatistics, recipe: Recipe) -> Tensor:
    """Union of the modalities' masks, bool [K]; the pooled statistics' if no modality has enough tokens."""
    mask = torch.zeros_like(pooled.minimum, dtype=torch.bool)
    # The outliers of a rare modality must be able to escape, too.
    for statistics in [each for each in modalities if each.tokens >= MIN_MASK_TOKENS] or [pooled]:
        dispersion = reference.dispersion_score(statistics)
        if recipe.dispersion_threshold is not None:
            mask |= dispersion >= recipe.dispersion_threshold
        # Without spread every channel lies at the threshold, which is the mean, and none is an outlier.
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

    One weighted mean over all drawn tokens replaces the reference's moving average over batches. With several
    modalities the average would mostly remember the modality of the last batches.
    """
    scores = torch.zeros(reference.SEARCH_RATIOS, low.numel(), device=low.device)
    for x, weight in parts:
        # Errors are weighted by token. The cosine is one number for the chunk, with the weight of all its tokens.
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
