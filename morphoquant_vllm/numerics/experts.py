"""A mixture of experts in torch: the definition that every backend must reproduce.

Expert e of a token x with weight w computes w * down_e(silu(gate_e(x)) * up_e(x)). All three are integer linears, as
in `linear`. A token's output is the sum over the experts that were chosen for it.

- x is quantized once per token: gate and up of all experts of a layer share one input and its record.
- gate, up and silu(gate) * up are rounded to the dtype of x, as torch does.
- The inputs of down have a record per expert. Their massive tokens are recognised by their own values.
- The sum over a token's experts runs in float64, and its result is cast once.

Letters beside those of the package: I is the intermediate size, T the number of experts of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, token_rows
from morphoquant_vllm.numerics.linear import FLOAT32_ROUNDING, WeightRecord, last_place, matmul, output_magnitude

# Codes [M, K] of x [M, K] and the row of each token, int32 [M].
Quantizer = Callable[[Tensor, Tensor, ActivationRecord], Tensor]


class ExpertsRecord(NamedTuple):
    """All experts of one layer. Fields of three of the records are stacked over E, their first dimension."""

    # codes [E, 2I, K/2], scale [E, 2I, K/G], channel_scale [E, 2I] or [E, 0], absorbed_bias [E, R, 2I].
    # Rows 0 to I-1 are gate, the others up.
    gate_up: WeightRecord
    # Of the one input of gate and up; not stacked.
    input: ActivationRecord
    # codes [E, K, I/2], scale [E, K, I/G], channel_scale [E, K] or [E, 0], absorbed_bias [E, R, K].
    down: WeightRecord
    # inverse, centre, mask [E, R, I], gain [E, R], channel_order [E, I], massive tensors [E, B, J].
    intermediate: ActivationRecord

    @property
    def size(self) -> int:
        """The number of experts."""
        return self.down.codes.shape[0]

    def expert(self, index: int) -> tuple[WeightRecord, WeightRecord, ActivationRecord]:
        """The records of one expert: gate_up, down, and the activation of down."""
        return (
            WeightRecord(*(field[index] for field in self.gate_up)),
            WeightRecord(*(field[index] for field in self.down)),
            ActivationRecord(*(field[index] for field in self.intermediate)),
        )


def experts_record(
    gate: Sequence[WeightRecord],
    up: Sequence[WeightRecord],
    input: ActivationRecord,
    down: Sequence[WeightRecord],
    intermediate: Sequence[ActivationRecord],
) -> ExpertsRecord:
    """The record of a layer from those of each expert's linears."""
    gate_up = [joined(*pair) for pair in zip(gate, up, strict=True)]
    return ExpertsRecord(
        WeightRecord(*map(torch.stack, zip(*gate_up, strict=True))),
        input,
        WeightRecord(*map(torch.stack, zip(*down, strict=True))),
        ActivationRecord(*map(torch.stack, zip(*intermediate, strict=True))),
    )


def joined(gate: WeightRecord, up: WeightRecord) -> WeightRecord:
    """gate and up as one linear: outputs of gate first."""
    codes, scale, channel_scale = (torch.cat(pair) for pair in zip(gate[:3], up[:3], strict=True))
    return WeightRecord(codes, scale, channel_scale, torch.cat((gate.absorbed_bias, up.absorbed_bias), dim=1))


def experts(
    x: Tensor,
    modality: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    record: ExpertsRecord,
    quantize: Quantizer = act_quant,
) -> Tensor:
    """y [M, K] in the dtype of x [M, K]; modality int32 [M] names the row of each token that is not massive.

    topk_weights [M, T] is float32, topk_ids [M, T] int32 or int64. An id below 0, or E and above, adds nothing: its
    expert lies on another rank.
    """
    h = intermediate(x, modality, topk_ids, record, quantize)
    return weighted_sum(h, modality, topk_weights, topk_ids, record, quantize).to(x.dtype)


def intermediate(
    x: Tensor, modality: Tensor, topk_ids: Tensor, record: ExpertsRecord, quantize: Quantizer = act_quant
) -> Tensor:
    """silu(gate) * up of each token's experts, [M, T, I] in the dtype of x [M, K]; zeros for ids of other ranks."""
    rows = token_rows(x, modality, record.input)
    codes = quantize(x, rows, record.input)
    h = x.new_zeros(*topk_ids.shape, record.intermediate.channel_order.shape[1])
    for index, tokens, slots in routed(topk_ids, record.size):
        gate_up, _, _ = record.expert(index)
        y = matmul(codes[tokens], rows[tokens], gate_up, record.input.gain, None).to(x.dtype)
        gate, up = y.chunk(2, dim=1)
        h[tokens, slots] = silu(gate) * up
    return h


def weighted_sum(
    h: Tensor,
    modality: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    record: ExpertsRecord,
    quantize: Quantizer = act_quant,
) -> Tensor:
    """The sum of weights times down over each token's experts, float64 [M, K], of h [M, T, I]."""
    y = h.new_zeros(h.shape[0], record.down.codes.shape[1], dtype=torch.float64)
    for index, tokens, slots in routed(topk_ids, record.size):
        _, down, activation = record.expert(index)
        inputs = h[tokens, slots]
        rows = token_rows(inputs, modality[tokens], activation)
        codes = quantize(inputs, rows, activation)
        weight = topk_weights[tokens, slots].double()[:, None]
        y.index_add_(0, tokens, weight * matmul(codes, rows, down, activation.gain, None))
    return y


def routed(topk_ids: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert below `count` that a token chose, with those tokens and their slots, int64 each, in rising order."""
    chosen = topk_ids.unique().tolist()
    for index in (index for index in chosen if 0 <= index < count):
        yield (index, *(topk_ids == index).nonzero(as_tuple=True))


def experts_bound(
    h: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, record: ExpertsRecord, reference: Tensor
) -> Tensor:
    """Largest difference of another backend's output from `reference` [M, K] (in its dtype), float64 [M, K].

    One unit in the last place, plus I/G + T + 5 float32 roundings of each weighted output of down. It holds for equal
    codes of h [M, T, I]. A gate or up that rounds to the neighbouring value of its dtype may change codes of h, which
    the bound does not cover.
    """
    roundings = record.down.scale.shape[2] + topk_ids.shape[1] + 5
    magnitude = torch.zeros(reference.shape, dtype=torch.float64, device=h.device)
    for index, tokens, slots in routed(topk_ids, record.size):
        _, down, activation = record.expert(index)
        rows = token_rows(h[tokens, slots], modality[tokens], activation)
        codes = act_quant(h[tokens, slots], rows, activation)
        weight = topk_weights[tokens, slots].double().abs()[:, None]
        magnitude.index_add_(0, tokens, weight * output_magnitude(codes, rows, down, activation.gain))
    return last_place(reference) + roundings * FLOAT32_ROUNDING * magnitude
