"""Weight-only baselines: a weight matrix [N, K] rounded to 4 bits, as float32 again."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.quantize.rounding import fitting_damping, quantize_compensated, quantize_two_level
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.weights import channel_order, group_scales, round_int4

NF4_BLOCK = 64
# NormalFloat4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E), as float32 in bitsandbytes.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def clip_scale(grouped: Tensor) -> Tensor:
    """Scale of each group, float32 [N, groups], of weights [N, groups, G]: the best of 21 fractions.

    The best has the least sum of squared errors. Scales are rounded to bfloat16, as served formats store them.
    """
    return group_scales(grouped, torch.ones(grouped.shape[1:])).float()


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest multiple of `scale` (broadcast) with a factor in [-8, 7]."""
    return round_int4(weight, scale) * scale


def rtn_int4(weight: Tensor, group_size: int) -> Tensor:
    """Symmetric int4, rounded to nearest, in groups of natural channel order, with scales by clip search."""
    check_groups(weight, group_size)
    grouped = weight.float().unflatten(1, (-1, group_size))
    return nearest(grouped, clip_scale(grouped)[..., None]).flatten(1)


def nf4(weight: Tensor, block: int = NF4_BLOCK) -> Tensor:
    """NormalFloat4 in blocks of the flattened matrix, absolute maxima in float32 (no double quantization)."""
    table = torch.tensor(NF4_VALUES)
    flat = weight.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    peak = padded.abs().amax(1, keepdim=True)
    unit = padded / torch.where(peak > 0, peak, 1.0)
    # The index of the nearest value is the number of midpoints below.
    midpoints = (table[1:] + table[:-1]) / 2
    rounded = table[torch.bucketize(unit, midpoints)] * peak
    return rounded.flatten()[: flat.numel()].view_as(weight)


def ours_int4(weight: Tensor, hessian: Tensor, tokens: int, group_size: int, levels: int) -> Tensor:
    """Calibration's own rounding of `weight` [N, K] for inputs of the second moments `hessian` [K, K]; float32 [N, K].

    `hessian` is the mean of x^T x over `tokens` tokens. Channels are sorted as those of a checkpoint whose step is the
    channel's root mean square. Scales are free, or with `levels` two-level.
    """
    check_groups(weight, group_size)
    size = hessian.diagonal().clamp(min=0).sqrt()
    order = channel_order(weight.float() * size).long()
    target, own = weight.float()[:, order], hessian[order][:, order]
    damping = fitting_damping(weight.shape[1], tokens)
    if levels:
        codes, level, unit = quantize_two_level(target, own, group_size, levels, damping)
        scale = level.float() * unit[:, None]
    else:
        codes, free = quantize_compensated(target, own, group_size, damping)
        scale = free.float()
    rounded = codes.float().unflatten(1, (-1, group_size)) * scale[..., None]
    return rounded.flatten(1)[:, order.argsort()]


def check_groups(weight: Tensor, group_size: int) -> None:
    """Raise MorphoQuantError if K of `weight` [N, K] is not divisible by the group size."""
    if weight.shape[1] % group_size:
        raise MorphoQuantError(
            f"K = {weight.shape[1]} is not divisible by group size {group_size}; choose a method of another group size"
        )
