"""Weights to int4 with error compensation, on the Hessian of the integer codes that the served layer multiplies. Pure.

The first step searches codes and scales of each group; later groups compensate for errors (`group_search.compensate`).
Then two steps alternate: the scales are fitted to the codes (`scale_fit`), and each group is searched again with the
others fixed (`group_search.improve`). Scales are free (bfloat16), or two-level: an integer level times a channel scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.quantize.allowed_scales import AllowedScales, FreeScales, LevelScales
from calibration.quantize.group_search import Ordered, compensate, improve, ordered
from calibration.quantize.two_level import fitted_levels
from morphoquant_vllm.numerics import weights

# The damping is a fraction of the Hessian's mean diagonal. It is this many times channels over tokens, and at least
# GPTQ's own 0.01.
DAMPING_STRENGTH = 2.0
LEAST_DAMPING = 0.01
# Turns of fitting scales and codes to each other; each lowers the loss.
TURNS = 3


def fitting_damping(channels: int, tokens: float) -> float:
    """The damping of second moments of this many channels, estimated from this many tokens.

    Compensation moves errors to directions in which few tokens have energy. The fewer tokens there are for each
    channel, the more these directions are those of these very tokens, which no other tokens share.
    """
    return max(LEAST_DAMPING, DAMPING_STRENGTH * channels / tokens)


def order_of(hessian: Tensor, group_size: int, damping: float) -> Ordered:
    """What the functions below find out of these arguments, for several calls with other outputs."""
    return ordered(damp(hessian, damping), group_size)


def quantize_compensated(
    fitted: Tensor, hessian: Tensor, group_size: int, damping: float, taken: Ordered | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale bfloat16 [N, K/G] of `fitted`, float32 [N, K], columns in channel order.

    hessian [K, K]: mean of code^T code in the same order. `damping` x its mean diagonal is added to its diagonal.
    `taken`: as from `order_of`, or None.
    """
    codes, scale, _ = _quantize(fitted.float(), damp(hessian, damping), group_size, FreeScales(), taken)
    return codes.to(torch.int8), scale.bfloat16()


def quantize_two_level(
    fitted: Tensor, hessian: Tensor, group_size: int, levels: int, damping: float, taken: Ordered | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [N, K], levels uint8 [N, K/G], 1 to `levels`, and channel scale float32 [N]: see quantize_compensated.

    The scale of a group is level * channel_scale as float32 computes it. Codes are rounded against that product.
    """
    fitted, damped = fitted.float(), damp(hessian, damping)
    energy = damped.diagonal().unflatten(0, (-1, group_size))
    suited = weights.group_scales(fitted.unflatten(1, (-1, group_size)), energy)
    _, channel_scale = fitted_levels(suited, energy.sum(1).expand_as(suited), levels)
    codes, scale, allowed = _quantize(fitted, damped, group_size, LevelScales(channel_scale, levels), taken)
    assert isinstance(allowed, LevelScales)
    return codes.to(torch.int8), allowed.level(scale.T).T.to(torch.uint8).contiguous(), allowed.channel_scale


def _quantize(
    fitted: Tensor, damped: Tensor, group_size: int, allowed: AllowedScales, taken: Ordered | None
) -> tuple[Tensor, Tensor, AllowedScales]:
    """Codes as floats [N, K], the scales float32 [N, K/G] fitted to them, and the set of scales allowed then."""
    codes, scale = compensate(fitted, damped, group_size, allowed, taken)
    aimed = fitted @ damped
    for _ in range(TURNS):
        scale, allowed = allowed.fitted(aimed, damped, codes, scale)
        codes, scale = improve(fitted, damped, codes, scale, allowed)
    scale, allowed = allowed.fitted(aimed, damped, codes, scale)
    return codes, scale, allowed


def damp(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian in float32 with `damping` x its mean diagonal added to its diagonal; the identity if it is zero."""
    damped = hessian.float().clone()
    mean = damped.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(damped.shape[0], device=damped.device)
    damped.diagonal().add_(damping * mean)
    return damped
