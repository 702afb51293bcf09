"""The layout of routed experts in GPU memory: records as gpu.layout lays them out, stacked over E. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from morphoquant_vllm.gpu import layout
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord


class GpuExperts(NamedTuple):
    """All experts of one layer in the kernels' layout."""

    gate_up: GpuWeight  # all fields stacked over E
    input: GpuActivation  # of the one input of gate and up; not stacked
    input_gain: Tensor  # its gain for each expert, float32 [E, R]
    down: GpuWeight  # stacked
    # Stacked. channel_order is [0] if the channels of every expert come in channel order.
    intermediate: GpuActivation
    group_size: int  # G of the tile table

    @property
    def size(self) -> int:
        """The number of experts."""
        return self.down.codes.shape[0]


def prepare(record: ExpertsRecord) -> GpuExperts:
    """Lay a canonical record out on its device, expert by expert; the canonical weights are not kept."""
    first = layout.prepare_weight(record.expert(0)[0])
    shared = layout.prepare_activation(record.input)
    return GpuExperts(
        prepare_weights(record.gate_up),
        shared,
        shared.gain.expand(record.size, -1).contiguous(),
        prepare_weights(record.down),
        prepare_intermediate(record.intermediate),
        layout.group_size_of(first),
    )


def prepare_weights(stacked: WeightRecord) -> GpuWeight:
    """Weights of all experts; besides them, memory holds one expert's at a time."""
    count = stacked.codes.shape[0]
    made: list[Tensor] = []
    for index in range(count):
        one = layout.prepare_weight(WeightRecord(*(field[index] for field in stacked)))
        if not made:
            made = [part.new_empty((count, *part.shape)) for part in one[:3]]
        for whole, part in zip(made, one[:3], strict=True):
            whole[index] = part
    # The handle is this tensor, so it stays where it is.
    return GpuWeight(made[0], made[1], made[2], stacked.absorbed_bias.contiguous())


def prepare_intermediate(stacked: ActivationRecord) -> GpuActivation:
    """Stacked tables; channel_order is kept for all experts if any needs it."""
    order = stacked.channel_order
    in_order = bool((order == torch.arange(order.shape[1], device=order.device)).all())
    made = []
    for index in range(order.shape[0]):
        one = layout.prepare_activation(ActivationRecord(*(field[index] for field in stacked)))
        made.append(one._replace(channel_order=order.new_empty(0)))
    fields = GpuActivation(*map(torch.stack, zip(*made, strict=True)))
    return fields._replace(channel_order=order.new_empty(0) if in_order else order.contiguous())
