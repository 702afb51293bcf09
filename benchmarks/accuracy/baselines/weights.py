"""Weight-only baselines: what a weight matrix [N, K] becomes after rounding to 4 bits, as float32 again."""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.weights import CLIP_RATIOS, EMPTY_GROUP_SCALE, INT4_MAX, INT4_MIN

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
    """Scale of each group [...] of weights [..., G]: of 21 fractions of the one that clips nothing, the best.

    Best by the sum of squared errors of the weights. Scales are rounded to bfloat16, as served formats store them.
    """
    peak = grouped.abs().amax(-1)
    best_error = torch.full_like(peak, float("inf"))
    best_scale = torch.full_like(peak, EMPTY_GROUP_SCALE)
    for ratio in CLIP_RATIOS:
        scale = (peak * (ratio / INT4_MAX)).bfloat16().float()
        scale = torch.where(scale > 0, scale, EMPTY_GROUP_SCALE)
        error = (round_int4(grouped, scale[..., None]) - grouped).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def round_int4(weight: Tensor, scale: Tensor) -> Tensor:
    """The multiple of `scale` (broadcast) in [-8, 7] that lies nearest."""
    return torch.round(weight / scale).clamp_(INT4_MIN, INT4_MAX) * scale


def rtn_int4(weight: Tensor, group_size: int) -> Tensor:
    """Symmetric int4, round to nearest, in groups of natural channel order, scales by clip search."""
    check_groups(weight, group_size)
    grouped = weight.float().unflatten(1, (-1, group_size))
    return round_int4(grouped, clip_scale(grouped)[..., None]).flatten(1)


def nf4(weight: Tensor, block: int = NF4_BLOCK) -> Tensor:
    """NormalFloat4 in blocks of the flattened matrix, absolute maxima in float32 (no double quantization)."""
    table = torch.tensor(NF4_VALUES)
    flat = weight.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    peak = padded.abs().amax(1, keepdim=True)
    unit = padded / torch.where(peak > 0, peak, 1.0)
    # Nearest value: the index counts the midpoints that lie below.
    midpoints = (table[1:] + table[:-1]) / 2
    rounded = table[torch.bucketize(unit, midpoints)] * peak
    return rounded.flatten()[: flat.numel()].view_as(weight)


def check_groups(weight: Tensor, group_size: int) -> None:
    """Raise MorphoQuantError where K of `weight` [N, K] is not divisible by the group size."""
    if weight.shape[1] % group_size:
        raise MorphoQuantError(
            f"K = {weight.shape[1]} is not divisible by group size {group_size}; choose a method of another group size"
        )
