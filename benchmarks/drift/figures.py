"""Differences of two runs, and how often noise of one unit in the last place moves a code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaps(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean, 99 % quantile and largest difference of two runs' log probabilities."""
    apart = (torch.tensor(one) - torch.tensor(other)).abs()
    return {"mean": float(apart.mean()), "p99": float(apart.quantile(0.99)), "largest": float(apart.max())}


def moved_codes(x: Tensor, step: float, shift: float) -> float:
    """The share of codes of `x`, a bfloat16 tensor, that change if each value goes to the next bfloat16 away from 0.

    Values are divided by `step` and rounded half to even. `shift`, in steps, moves the limits between codes off the
    values that bfloat16 can have: the tie rule.
    """
    noisy = (x.view(torch.int16) + 1).view(torch.bfloat16)
    before, after = ((value.float() / step + shift).round() for value in (x, noisy))
    return float((before != after).float().mean())


def ties(x: Tensor, step: float) -> float:
    """The share of values of `x` that lie exactly between two codes."""
    scaled = x.float() / step
    return float((scaled - scaled.floor() == 0.5).float().mean())
