"""The error of rounded weights on other tokens, by the damping and the number of tokens they were rounded for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calibration.quantize.rounding import quantize_two_level
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.limits import MAX_LEVEL

GROUP_SIZE = 32
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


def rounded(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """`weight` [N, K] in calibration's rounding with two-level scales, for inputs of these second moments [K, K]."""
    order = weights.channel_order(weight * hessian.diagonal().sqrt()).long()
    codes, *scales = quantize_two_level(weight[:, order], hessian[order][:, order], GROUP_SIZE, MAX_LEVEL, damping)
    return weights.dequantize_weight(weights.pack(codes), *scales)[:, order.argsort()]


def relative_loss(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """The squared error of the outputs of `other` [N, K] over the squared outputs of `weight`."""
    gap = other - weight
    return float(((gap @ hessian) * gap).sum() / ((weight @ hessian) * weight).sum())


@torch.no_grad()
def measure(
    weight: Tensor,
    seen: Sequence[Tensor],
    others: Sequence[Tensor],
    fixed: float,
    strengths: Sequence[float],
) -> dict[str, Any]:
    """Losses on the windows `others` of weights that are rounded for the windows `seen`, each [M, K].

    `fixed` is one damping for all; with a strength it is strength * K / tokens.
    MorphoQuantError if groups do not divide the channels.
    """
    if weight.shape[1] % GROUP_SIZE:
        raise MorphoQuantError(f"K = {weight.shape[1]} is not divisible by {GROUP_SIZE}; choose another model")
    weight, tokens = weight[:OUTPUTS].float(), tokens_of(seen)
    hessian, judge = second_moments(seen), second_moments(others)
    dampings = {"fixed": fixed, **{str(each): each * weight.shape[1] / tokens for each in strengths}}
    losses = {
        name: relative_loss(weight, rounded(weight, hessian, damping), judge) for name, damping in dampings.items()
    }
    return {"in_features": weight.shape[1], "tokens": tokens, "losses": losses}
