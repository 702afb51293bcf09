"""The integer linear layer in torch: the definition that every backend must reproduce.

    y[m, n] = gain[r] * sum_g scale[n, g] * sum_{k in g} code[m, k] * q[n, k]  +  absorbed_bias[r, n]  (+ bias[n])

Two-level scales are scale[n, g] = level[n, g] * channel_scale[n] with whole levels, 1 to 16:

    y[m, n] = gain[r] * channel_scale[n] * sum_g level[n, g] * sum_{k in g} code[m, k] * q[n, k]  +  ...

A weight q has 4 bits, or 8 with group scales. Group sums are exact integers, below 2^22. So is the sum of a layer's
groups weighted by levels: below 2^31 while K < 2^17. Here a sum of scaled group sums runs in float64, and the result is
cast once. Another backend may differ by `output_bound`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, token_rows
from morphoquant_vllm.numerics.weights import dequantize_weight, integer_codes, times_group

# Relative error of one float32 operation, as the bounds of other backends count it.
FLOAT32_ROUNDING = 2.0**-23


class WeightRecord(NamedTuple):
    """One layer's weights in the canonical layout; K follows the permuted channel order."""

    codes: Tensor  # uint8 [N, K/2], see weights.pack; int8 [N, K] of 8-bit weights
    scale: Tensor  # bfloat16 [N, K/G]; with two-level scales the levels, uint8 [N, K/G]
    channel_scale: Tensor  # float32 [N] with two-level scales, else [0]
    absorbed_bias: Tensor  # float32 [R, N]

    @property
    def two_level(self) -> bool:
        """Whether group scales are levels times a scale of the output channel."""
        return self.scale.dtype is torch.uint8

    def group_scales(self) -> Tensor:
        """The scale of each group, exact, float64 [N, K/G]."""
        scale = self.scale.double()
        return scale * self.channel_scale.double()[:, None] if self.two_level else scale

    def dequantized(self) -> Tensor:
        """The weights of the codes, float32 [N, K]; see weights.dequantize_weight."""
        return dequantize_weight(self.codes, self.scale, self.channel_scale if self.two_level else None)


def weight_record(
    codes: Tensor, scale: Tensor, absorbed_bias: Tensor, channel_scale: Tensor | None = None
) -> WeightRecord:
    """The record of a checkpoint's tensors; absorbed_bias [B, R, N] is summed over its blocks of K.

    With `channel_scale`, float32 [N], `scale` holds the levels of two-level scales.
    """
    if channel_scale is None:
        channel_scale = codes.new_empty(0, dtype=torch.float32)
    return WeightRecord(codes, scale, channel_scale, absorbed_bias.double().sum(0).float())


def matmul(codes: Tensor, rows: Tensor, weight: WeightRecord, gain: Tensor, bias: Tensor | None) -> Tensor:
    """y as float64 [M, N] from activation codes int8 [M, K] of tokens in `rows` int32 [M].

    One float64 product: code * q * scale has at most 24 significant bits, so every group sum is exact. With levels
    instead of scales the whole sum is exact, because it adds up integers.
    """
    rows = rows.long()
    y = codes.double() @ times_group(weight.codes, weight.scale).double().T
    if weight.two_level:
        y *= weight.channel_scale.double()
    y = y * gain.double()[rows, None] + weight.absorbed_bias.double()[rows]
    return y if bias is None else y + bias.double()


def linear(
    x: Tensor, modality: Tensor, weight: WeightRecord, activation: ActivationRecord, bias: Tensor | None = None
) -> Tensor:
    """y [M, N] in the dtype of x [M, K]; modality int32 [M] names the row of each token that is not massive."""
    rows = token_rows(x, modality, activation)
    codes = act_quant(x, rows, activation)
    return matmul(codes, rows, weight, activation.gain, bias).to(x.dtype)


def group_sums(codes: Tensor, weight: WeightRecord) -> Tensor:
    """The integer group sums, int32 [M, N, K/G], for tests of other backends."""
    groups = weight.scale.shape[1]
    left = codes.unflatten(1, (groups, -1)).float()
    right = integer_codes(weight.codes).unflatten(1, (groups, -1)).float()
    return torch.einsum("mgk,ngk->mng", left, right).int()


def output_bound(codes: Tensor, rows: Tensor, weight: WeightRecord, gain: Tensor, reference: Tensor) -> Tensor:
    """Largest difference of another backend's output from `reference` [M, N] (in its dtype), float64 [M, N].

    One unit in the last place of the output dtype, plus K/G + 4 float32 roundings of `output_magnitude`.
    """
    magnitude = output_magnitude(codes, rows, weight, gain)
    return last_place(reference) + (weight.scale.shape[1] + 4) * FLOAT32_ROUNDING * magnitude


def output_magnitude(codes: Tensor, rows: Tensor, weight: WeightRecord, gain: Tensor) -> Tensor:
    """gain * sum_g |scale_g * acc_g| + |absorbed_bias|, float64 [M, N]: the size of what float32 sums round."""
    rows = rows.long()
    sums = group_sums(codes, weight).double().abs()
    magnitude = torch.einsum("mng,ng->mn", sums, weight.group_scales().abs())
    return magnitude * gain.double()[rows, None] + weight.absorbed_bias.double()[rows].abs()


def last_place(values: Tensor) -> Tensor:
    """One unit in the last place of each value in its dtype, float64."""
    info = torch.finfo(values.dtype)
    exponent = torch.floor(torch.log2(values.double().abs().clamp(min=info.tiny)))
    return info.eps * torch.exp2(exponent)
