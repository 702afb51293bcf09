"""One layer of routed experts: its sizes, generated records of ours, and a routing of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord

# text, image, video, audio, any, massive.
ROWS = 6


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer of experts."""

    name: str
    experts: int
    chosen: int  # by each token
    hidden: int
    between: int


QWEN3_OMNI = Layer("Qwen3-Omni-30B-A3B", 128, 8, 2048, 768)


def generated(layer: Layer, group_size: int, two_level: bool) -> ExpertsRecord:
    """Canonical records with random values, which take as long as calibrated ones. No token is massive.

    The input of down comes in channel order, as calibration leaves it.
    """
    generator = torch.Generator().manual_seed(1)
    count, hidden, between = layer.experts, layer.hidden, layer.between

    def weight(outputs: int, channels: int) -> WeightRecord:
        groups = (count, outputs, channels // group_size)
        return WeightRecord(
            torch.randint(256, (count, outputs, channels // 2), generator=generator, dtype=torch.uint8),
            torch.full(groups, 8, dtype=torch.uint8) if two_level else torch.full(groups, 0.01).bfloat16(),
            torch.full((count, outputs if two_level else 0), 0.00125),
            torch.zeros(count, ROWS, outputs),
        )

    def activation(channels: int, order: Tensor) -> ActivationRecord:
        return ActivationRecord(
            inverse=torch.full((ROWS, channels), 3.0),
            centre=torch.zeros(ROWS, channels),
            mask=torch.rand(ROWS, channels, generator=generator) < 0.5,
            gain=torch.ones(ROWS),
            channel_order=order.int(),
            massive_channel=torch.arange(4, dtype=torch.int32)[None],
            massive_low=torch.full((1, 4), 1e30),
            massive_high=torch.full((1, 4), 2e30),
        )

    each = activation(between, torch.arange(between))
    stacked = ActivationRecord(*(field.expand(count, *field.shape) for field in each))
    return ExpertsRecord(
        weight(2 * between, hidden),
        activation(hidden, torch.randperm(hidden, generator=generator)),
        weight(hidden, between),
        stacked,
    )


def routing(tokens: int, layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights float32 and ids int32 [M, T] of each token's experts, all equally likely; the weights add up to 1."""
    scores = torch.rand(tokens, layer.experts, generator=generator)
    weights, ids = scores.topk(layer.chosen)
    return (weights / weights.sum(1, keepdim=True)).contiguous(), ids.int()
