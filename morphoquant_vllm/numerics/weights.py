"""Weights of the served form: steps absorbed, channels sorted, rounded in groups to int4, two to a byte, or to int8."""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MIN, INT4_MAX = -8, 7
INT8_MIN, INT8_MAX = -128, 127
# Candidate scales of the clip search, as fractions of the scale that clips nothing.
CLIP_RATIOS = tuple(1.0 - 0.025 * index for index in range(21))
# Scale of a group whose weights are all zero. Any positive number works; this one is exact in bfloat16.
EMPTY_GROUP_SCALE = 2.0**-20


def absorb(weight: Tensor, step: Tensor) -> Tensor:
    """W' = W * step: weight [N, K] with each input channel's activation step [K] folded in, float32."""
    return weight.float() * step.float()[None, :]


def channel_order(absorbed: Tensor, blocks: int = 1) -> Tensor:
    """Channels by falling column norm of W' [N, K], int32 [K]: columns of similar size share a group.

    `absorbed` holds the concatenated shards of a fused layer. With `blocks` > 1 (tensor-parallel ranks of a
    row-parallel layer) the order stays within each of `blocks` equal blocks of K. Equal norms keep their order.
    """
    in_features = absorbed.shape[1]
    if in_features % blocks:
        raise ValueError(f"K = {in_features} is not divisible into {blocks} tensor-parallel blocks")
    norms = absorbed.double().square().sum(0).view(blocks, -1)
    order = norms.argsort(dim=1, descending=True, stable=True)
    offsets = torch.arange(blocks)[:, None] * (in_features // blocks)
    return (order + offsets).flatten().int()


def quantize_int4(absorbed: Tensor, importance: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round W' [N, K] (columns already in channel order) to symmetric int4: codes int8 [N, K], scale bfloat16 [N, K/G].

    Each weight is rounded separately, with its group's scale from `group_scales`.
    """
    outputs, in_features = absorbed.shape
    if in_features % group_size:
        raise ValueError(f"K = {in_features} is not divisible by group size {group_size}")
    grouped = absorbed.float().view(outputs, -1, group_size)
    scale = group_scales(grouped, importance.float().view(-1, group_size))
    return round_int4(grouped, scale[..., None].float()).view(outputs, in_features).to(torch.int8), scale


def quantize_int8(absorbed: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round W' [N, K] (columns already in channel order) to symmetric int8: codes int8 [N, K], scale bfloat16 [N, K/G].

    The scale of a group is that of its largest weight. Codes are rounded against the scale as bfloat16 stores it.
    """
    grouped = absorbed.float().unflatten(1, (-1, group_size))
    scale = (grouped.abs().amax(-1) / INT8_MAX).bfloat16()
    scale = torch.where(scale > 0, scale, EMPTY_GROUP_SCALE).bfloat16()
    codes = torch.round(grouped / scale.float()[..., None]).clamp_(INT8_MIN, INT8_MAX)
    return codes.flatten(1).to(torch.int8), scale


def group_scales(grouped: Tensor, importance: Tensor) -> Tensor:
    """Scale of each group, bfloat16 [N, groups], of weights float32 [N, groups, G], searched over CLIP_RATIOS.

    A column's error is weighted by importance [groups, G] = E[code^2], which makes the sum the error of the output.
    Errors are measured with the scale rounded to bfloat16.
    """
    weight = importance[None]
    peak = grouped.abs().amax(-1)
    best_error = torch.full_like(peak, float("inf"))
    best_scale = torch.full_like(peak, EMPTY_GROUP_SCALE)
    for ratio in CLIP_RATIOS:
        scale = (peak * (ratio / INT4_MAX)).bfloat16().float()
        scale = torch.where(scale > 0, scale, EMPTY_GROUP_SCALE)
        rounded = round_int4(grouped, scale[..., None]).mul_(scale[..., None])
        error = rounded.sub_(grouped).square_().mul_(weight).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.bfloat16()


def round_int4(weight: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """The nearest int4 codes of weight / scale, as floats, written to `out` if it is given; `scale` broadcasts."""
    return torch.div(weight, scale, out=out).round_().clamp_(INT4_MIN, INT4_MAX)


def pack(codes: Tensor) -> Tensor:
    """int4 codes int8 [N, K] -> uint8 [N, K/2]: q + 8, channel 2j in the low nibble of byte j, 2j + 1 in the high."""
    if codes.shape[1] % 2:
        raise ValueError(f"packing needs an even K, got {codes.shape[1]}")
    if codes.numel() and (int(codes.min()) < INT4_MIN or int(codes.max()) > INT4_MAX):
        raise ValueError(f"int4 codes must lie in [{INT4_MIN}, {INT4_MAX}]")
    unsigned = (codes - INT4_MIN).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> int4 codes as int8 [N, K]; the inverse of `pack`."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return nibbles.flatten(1).to(torch.int8) + INT4_MIN


def integer_codes(stored: Tensor) -> Tensor:
    """The codes of weights as int8 [N, K], from their stored form: uint8 [N, K/2] of `pack`, or 8-bit codes int8."""
    return stored if stored.dtype is torch.int8 else unpack(stored)


def times_group(stored: Tensor, scale: Tensor) -> Tensor:
    """q * scale as float32 [N, K] in permuted order, of stored codes and of scales or levels [N, K/G].

    Exact: 8 bits times bfloat16 fit a float32, and so do 4 bits times a level.
    """
    codes = integer_codes(stored)
    grouped = codes.view(codes.shape[0], scale.shape[1], -1)
    return (grouped * scale.float()[..., None]).view(codes.shape)


def dequantize_weight(stored: Tensor, scale: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """The weights of the codes, float32 [N, K] in permuted order: q * scale, exact.

    With `channel_scale`, float32 [N], `scale` holds levels: q * level * channel_scale, the last product rounded once.
    """
    weight = times_group(stored, scale)
    return weight if channel_scale is None else weight.mul_(channel_scale[:, None])


def absorbed_bias(weight: Tensor, centre: Tensor, blocks: int = 1) -> Tensor:
    """The centres' contribution W @ centre to the output, float32 [B, R, N]; W [N, K] in full precision, centre [R, K].

    One sum for each of B equal `blocks` of K, which may lie on different ranks; their total is the layer's bias.
    """
    left = centre.double().unflatten(1, (blocks, -1))
    right = weight.double().unflatten(1, (blocks, -1))
    return torch.einsum("rbk,nbk->brn", left, right).float()
