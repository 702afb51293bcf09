"""Weights of the served form: steps absorbed, channels sorted, rounded to int4 in groups, packed two to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MIN, INT4_MAX = -8, 7
# Candidate scales of the clip search, as fractions of the scale that clips nothing.
CLIP_RATIOS = tuple(1.0 - 0.025 * index for index in range(21))
# Scale of a group whose weights are all zero: any positive number serves, this one is exact in bfloat16.
EMPTY_GROUP_SCALE = 2.0**-20


def absorb(weight: Tensor, step: Tensor) -> Tensor:
    """W' = W * step: weight [N, K] with each input channel's activation step [K] folded in, float32."""
    return weight.float() * step.float()[None, :]


def channel_order(absorbed: Tensor, blocks: int = 1) -> Tensor:
    """Channels by falling column norm of W' [N, K], int32 [K]: like sizes share a group.

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

    The scale of each group is searched over CLIP_RATIOS; the error of column k weighs importance[k] = E[code_k^2],
    which makes it the error of the layer's output. Codes are computed against the scale as rounded to bfloat16.
    """
    rows, in_features = absorbed.shape
    if in_features % group_size:
        raise ValueError(f"K = {in_features} is not divisible by group size {group_size}")
    grouped = absorbed.float().view(rows, -1, group_size)
    weight = importance.float().view(1, -1, group_size)
    peak = grouped.abs().amax(-1)
    best_error = torch.full_like(peak, float("inf"))
    best_scale = torch.full_like(peak, EMPTY_GROUP_SCALE)
    for ratio in CLIP_RATIOS:
        scale = (peak * (ratio / INT4_MAX)).bfloat16().float()
        scale = torch.where(scale > 0, scale, EMPTY_GROUP_SCALE)
        error = (_dequantize(_round(grouped, scale), scale) - grouped).square_().mul_(weight).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = _round(grouped, best_scale).view(rows, in_features)
    return codes.to(torch.int8), best_scale.bfloat16()


def _round(grouped: Tensor, scale: Tensor) -> Tensor:
    return torch.round(grouped / scale[..., None]).clamp_(INT4_MIN, INT4_MAX)


def _dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * scale[..., None]


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


def dequantize_weight(packed: Tensor, scale: Tensor) -> Tensor:
    """q * scale as float32 [N, K] in permuted order: exact, since 4 bits times bfloat16 fit a float32."""
    codes = unpack(packed)
    grouped = codes.view(codes.shape[0], scale.shape[1], -1)
    return (grouped * scale.float()[..., None]).view(codes.shape)


def absorbed_bias(weight: Tensor, centre: Tensor) -> Tensor:
    """What the centres add to the output: W @ centre, float32 [R, N], from full-precision W [N, K], centre [R, K]."""
    return (centre.double() @ weight.double().T).float()
