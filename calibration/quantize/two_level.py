"""Two-level scales for a layer that has group scales: exact if possible, else fitted to them. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.limits import MAX_LEVEL

# Number of channel scales that are tried for an output: its largest scale over divisors from 1/2 to 3/2 * levels.
# Divisors above the number of levels clip the largest scales. Whole numbers are among the divisors, so an output whose
# scales are whole multiples of one number keeps them.
TRIED = 8 * MAX_LEVEL + 1


def exact_levels(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Levels uint8 [N, K/G], 1 to 16, and channel scale float32 [N] whose products are `scale`, or None.

    scale: bfloat16 [N, K/G], positive. The products are equal as real numbers, so float32 rounds none of them.
    """
    wanted = scale.double()
    top = wanted.amax(1, keepdim=True)
    level = torch.zeros_like(wanted)
    # The smallest divisor wins: the channel scale is then the greatest common divisor of the output's scales, which has
    # 8 bits as well.
    for parts in range(MAX_LEVEL, 0, -1):
        found = (wanted * parts / top).round()
        # A scale has 8 bits and a level 5: float64 holds both sides exactly.
        whole = ((found >= 1) & (found * top == wanted * parts)).all(1, keepdim=True)
        level = torch.where(whole, found, level)
    if not bool((level > 0).all()):
        return None
    return level.to(torch.uint8), (top / level.amax(1, keepdim=True)).squeeze(1).float()


def fitted_levels(scale: Tensor, energy: Tensor, levels: int = MAX_LEVEL) -> tuple[Tensor, Tensor]:
    """Levels uint8 [N, K/G] and channel scale float32 [N] nearest to `scale` [N, K/G], each group by its `energy`.

    energy [N, K/G]: sum of the group's squared codes, the weight of an error of its scale.
    """
    wanted, energy = scale.double(), energy.double()
    top = wanted.amax(1, keepdim=True)
    least = torch.full_like(top, float("inf"))
    level, channel_scale = torch.ones_like(wanted), top
    for parts in torch.linspace(levels / 2, levels * 3 / 2, TRIED, dtype=torch.float64).tolist():
        tried = (top / parts).float().double()
        found = (wanted / tried).round().clamp(1, levels)
        error = (found * tried - wanted).square_().mul_(energy).sum(1, keepdim=True)
        better = error < least
        least, channel_scale = torch.where(better, error, least), torch.where(better, tried, channel_scale)
        level = torch.where(better, found, level)
    return level.to(torch.uint8), channel_scale.squeeze(1).float()


def nearest(fitted: Tensor, importance: Tensor, group_size: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [N, K], levels uint8 [N, K/G] and channel scale float32 [N] of `fitted` [N, K], each weight by itself.

    importance [K]: the weight of a squared error of each channel.
    """
    grouped, importance = fitted.float().unflatten(1, (-1, group_size)), importance.float().view(-1, group_size)
    suited = weights.group_scales(grouped, importance)
    level, channel_scale = fitted_levels(suited, importance.sum(1).expand_as(suited), levels)
    codes = weights.round_int4(grouped, (level.float() * channel_scale[:, None])[..., None])
    return codes.flatten(1).to(torch.int8), level, channel_scale


def refit(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """New codes int8 [N, K], levels uint8 [N, K/G], channel scale float32 [N], and the relative error of the weights.

    codes: int8 [N, K] in groups of `scale`, bfloat16 [N, K/G]. Every weight counts the same.
    """
    grouped = codes.float().unflatten(1, (scale.shape[1], -1))
    level, channel_scale = fitted_levels(scale, grouped.square().sum(-1))
    step = (level.float() * channel_scale[:, None])[..., None]
    weight = grouped * scale.float()[..., None]
    found = weights.round_int4(weight, step)
    size = float(weight.norm())
    error = float((found * step - weight).norm()) / size if size > 0 else 0.0
    return found.flatten(1).to(torch.int8), level, channel_scale, error
