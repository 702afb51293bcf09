"""The error of rounded weights on other tokens, by the damping and the number of tokens they were rounded for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calibration.quantize.rounding import quantize_two_level
from morphoquant_vllm.numerics.limits import MAX_LEVEL
from morphoquant_vllm.numerics.weights import channel_order

# Outputs of an input's linears that are rounded: the damping is of the input, and few outputs show its effect.
OUTPUTS = 256


def second_moments(inputs: Sequence[Tensor]) -> Tensor:
    """Mean of x x^T over the tokens of windows [M, K], float32 [K, K], in no window the first.

    That token is massive in many models, and a checkpoint has a row of its own for it.
    """
    total = sum(x[1:].float().T @ x[1:].float() for x in inputs)
    assert isinstance(total, Tensor)
    return total / tokens_of(inputs)


def tokens_of(inputs: Sequence[Tensor]) -> int:
    """The tokens that `second_moments` has seen."""
    return sum(x.shape[0] - 1 for x in inputs)


def rounded(weight: Tensor, hessian: Tensor, group_size: int, damping: float) -> Tensor:
    """`weight` [N, K] in calibration's rounding with two-level scales, for inputs of these second moments [K, K]."""
    order = channel_order(weight * hessian.diagonal().sqrt()).long()
    own = hessian[order][:, order]
    codes, level, unit = quantize_two_level(weight[:, order], own, group_size, MAX_LEVEL, damping)
    scale = level.float() * unit[:, None]
    return (codes.float().unflatten(1, (-1, group_size)) * scale[..., None]).flatten(1)[:, order.argsort()]


def relative_loss(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """The squared error of the outputs of `other` [N, K] over the squared outputs of `weight`."""
    gap = other - weight
    return float(((gap @ hessian) * gap).sum() / ((weight @ hessian) * weight).sum())


@torch.no_grad()
def measure(
    weight: Tensor,
    seen: Sequence[Tensor],
    others: Sequence[Tensor],
    group_size: int,
    fixed: float,
    strengths: Sequence[float],
) -> dict[str, Any]:
    """Losses on the windows `others` of weights that are rounded for the windows `seen`, each [M, K].

    `fixed` is one damping for all; with a strength it is strength * K / tokens.
    """
    weight, tokens = weight[:OUTPUTS].float(), tokens_of(seen)
    hessian, judge = second_moments(seen), second_moments(others)
    dampings = {"fixed": fixed, **{str(each): each * weight.shape[1] / tokens for each in strengths}}
    losses = {
        name: relative_loss(weight, rounded(weight, hessian, group_size, damping), judge)
        for name, damping in dampings.items()
    }
    return {"in_features": weight.shape[1], "tokens": tokens, "losses": losses}
