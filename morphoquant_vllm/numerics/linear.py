"""The integer linear layer in torch: the definition that every backend must reproduce.

    y[m, n] = gain[r] * sum_g scale[n, g] * sum_{k in g} code[m, k] * q[n, k]  +  absorbed_bias[r, n]  (+ bias[n])

Group sums are exact integers. Here the sum over groups runs in float64 and is cast once; another backend may differ
by `output_bound`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .activation import ActivationRecord, act_quant, token_rows
from .weights import dequantize_weight, unpack


class WeightRecord(NamedTuple):
    """One layer's weights in the canonical layout; K follows the permuted channel order."""

    codes: Tensor  # uint8 [N, K/2], see weights.pack
    scale: Tensor  # bfloat16 [N, K/G]
    absorbed_bias: Tensor  # float32 [R, N]


def weight_record(codes: Tensor, scale: Tensor, absorbed_bias: Tensor) -> WeightRecord:
    """The record of a checkpoint's tensors; absorbed_bias [B, R, N] is summed over the blocks of K at hand."""
    return WeightRecord(codes, scale, absorbed_bias.double().sum(0).float())


def matmul(codes: Tensor, rows: Tensor, weight: WeightRecord, gain: Tensor, bias: Tensor | None) -> Tensor:
    """y as float64 [M, N] from activation codes int8 [M, K] of tokens in `rows` int32 [M].

    One float64 product: code * q * scale has at most 20 significant bits, so that every group sum is exact.
    """
    rows = rows.long()
    y = codes.double() @ dequantize_weight(weight.codes, weight.scale).double().T
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
    """The integer group sums, int32 [M, N, K/G]: for tests of other backends."""
    groups = weight.scale.shape[1]
    left = codes.unflatten(1, (groups, -1)).float()
    right = unpack(weight.codes).unflatten(1, (groups, -1)).float()
    return torch.einsum("mgk,ngk->mng", left, right).int()


def output_bound(codes: Tensor, rows: Tensor, weight: WeightRecord, gain: Tensor, reference: Tensor) -> Tensor:
    """How far another backend's output may lie from `reference` [M, N] (in its dtype), float64 [M, N].

    One unit in the last place of the output dtype, plus (K/G + 4) * 2^-23 * (gain * sum_g |scale_g * acc_g| +
    |absorbed_bias|): K/G + 4 float32 roundings.
    """
    rows = rows.long()
    sums = group_sums(codes, weight).double().abs()
    magnitude = torch.einsum("mng,ng->mn", sums, weight.scale.double().abs())
    magnitude = magnitude * gain.double()[rows, None] + weight.absorbed_bias.double()[rows].abs()
    info = torch.finfo(reference.dtype)
    exponent = torch.floor(torch.log2(reference.double().abs().clamp(min=info.tiny)))
    ulp = info.eps * torch.exp2(exponent)
    return ulp + (weight.scale.shape[1] + 4) * 2.0**-23 * magnitude
