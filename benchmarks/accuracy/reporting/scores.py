"""From raw outcomes to figures with their standard errors. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from benchmarks.accuracy.baselines.oracle import BYPASS_BITS

CONFIDENCE = 0.95


def perplexity(losses: Sequence[float], tokens: int) -> float:
    """exp of the mean loss, from the summed losses of windows and the number of all tokens; inf if it is too large."""
    mean = sum(losses) / tokens
    return math.exp(mean) if mean < 700 else math.inf


def log_ratio(losses: Sequence[float], reference: Sequence[float], tokens: int) -> tuple[float, float]:
    """Logarithm of a perplexity over a reference's on the same windows, and its standard error over the windows."""
    gaps = [(a - b) * len(losses) / tokens for a, b in zip(losses, reference, strict=True)]
    return mean_and_error(gaps)


def accuracy(right: Sequence[int]) -> tuple[float, float]:
    """Share of right answers (1 or 0 each) and its standard error."""
    share = sum(right) / len(right)
    return share, math.sqrt(share * (1 - share) / len(right))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean of values less that of others on the same questions, and its standard error over the questions.

    Of right answers (1 or 0) the error comes from the questions where they differ, as in McNemar's test.
    """
    return mean_and_error([a - b for a, b in zip(values, reference, strict=True)])


def interval(mean: float, error: float, count: int) -> tuple[float, float]:
    """Interval of a mean of `count` values at CONFIDENCE, by Student's t, from its standard error."""
    half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return mean - half, mean + half


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def merge_counts(counts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Sum of several {layer: [escaped, all]}."""
    total: dict[str, list[int]] = {}
    for each in counts:
        for layer, (escaped, values) in each.items():
            before = total.get(layer, [0, 0])
            total[layer] = [before[0] + escaped, before[1] + values]
    return total


def activation_bits(counts: Mapping[str, Sequence[int]], kind: str) -> dict[str, Any]:
    """Rates of values beyond the 4-bit grid, overall and in the worst layer, and effective activation bits.

    `counts` {layer: [beyond, all]}; `kind` "escape" (an 8-bit code) or "bypass" (16 bits).
    """
    rates = {layer: beyond / values for layer, (beyond, values) in counts.items()}
    worst = max(rates, key=lambda layer: rates[layer])
    rate = sum(beyond for beyond, _ in counts.values()) / sum(values for _, values in counts.values())
    extra = {"escape": 4, "bypass": BYPASS_BITS - 4}[kind]
    return {"kind": kind, "rate": rate, "worst_rate": rates[worst], "worst_layer": worst, "bits": 4 + extra * rate}
