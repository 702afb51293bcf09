"""The authors' MorphoQuant in exact mode: a static 4-bit grid per channel, which masked outliers bypass in 16 bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import Tensor

from morphoquant_vllm.numerics import reference
from morphoquant_vllm.numerics.statistics import ChannelStatistics

# The authors search on 32 of their calibration samples.
SEARCH_SAMPLES = 32
BYPASS_BITS = 16


class Oracle:
    """One layer's activation quantizer; counts the values that bypass the grid."""

    def __init__(self, low: Tensor, high: Tensor, mask: Tensor) -> None:
        self.low, self.high, self.mask = low, high, mask
        self.limit = reference.escape_limit(low, high)
        self.bypassed = self.total = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.bypassed += int((self.mask & (x.abs() > self.limit)).sum())
        self.total += x.numel()
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        """x [..., K] as the layer sees it, without counting."""
        return reference.exact_quantize(x, self.low, self.high, self.mask)


def fit(inputs: Sequence[Tensor], full_mask: bool) -> Oracle:
    """Mask and ranges of one layer from its inputs [M, K], one tensor per calibration sample.

    Statistics are over all calibration samples. The search has a moving average over SEARCH_SAMPLES evenly spaced ones.
    """
    statistics = reduce(ChannelStatistics.merge, (ChannelStatistics.of(x) for x in inputs))
    mask = reference.outlier_mask(reference.dispersion_score(statistics))
    if full_mask:
        mask = mask | True
    low, high = reference.base_range(statistics.minimum, statistics.maximum, mask)
    count = min(SEARCH_SAMPLES, len(inputs))
    scores = None
    for index in range(count):
        x = inputs[index * len(inputs) // count].float()
        scores = reference.merge_scores(scores, reference.search_scores(x, low, high, mask))
    assert scores is not None
    ratio = reference.best_ratio(scores)
    return Oracle(ratio * low, ratio * high, mask)
