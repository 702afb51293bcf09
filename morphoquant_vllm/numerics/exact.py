"""Exact mode of the served form: values that escape the 4-bit grid are not rounded. An oracle, never served.

The authors' quantizer lets a masked outlier bypass the grid in 16 bit; serving gives it an 8-bit code instead. Here the
bypass is computed on the served grid: the difference between both modes is the cost of 8-bit escapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, escapes, token_rows
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts
from morphoquant_vllm.numerics.linear import WeightRecord, matmul


def exact_codes(x: Tensor, rows: Tensor, record: ActivationRecord) -> Tensor:
    """Codes of x [M, K] as float64 [M, K] in permuted order: integers, except that masked escapes are not rounded.

    rows int32 [M], as from `token_rows`. NaN and infinite values get the codes of `act_quant`.
    """
    codes = act_quant(x, rows, record)
    row = rows.long()
    position = x.double().index_select(1, record.channel_order) - record.centre.double()[row]
    position = position * record.inverse.double()[row]
    return torch.where(escapes(codes) & position.isfinite(), position, codes.double())


def linear_exact(
    x: Tensor, modality: Tensor, weight: WeightRecord, activation: ActivationRecord, bias: Tensor | None = None
) -> Tensor:
    """`linear.linear` in exact mode: y [M, N] in the dtype of x [M, K], modality int32 [M]."""
    rows = token_rows(x, modality, activation)
    return matmul(exact_codes(x, rows, activation), rows, weight, activation.gain, bias).to(x.dtype)


def experts_exact(x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, record: ExpertsRecord) -> Tensor:
    """`experts.experts` in exact mode: y [M, K] in the dtype of x [M, K]; the other arguments are the same."""
    return experts(x, modality, topk_weights, topk_ids, record, exact_codes)
