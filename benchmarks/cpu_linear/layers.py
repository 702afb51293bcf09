"""The linears of real models, with generated weights."""

from __future__ import annotations

import torch

from benchmarks.models import shapes
from benchmarks.models.shapes import fused
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record

# N x K of the decoder's (fused) linears; "bars" are single projections of the largest and the smallest model.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "bars": {"up_proj 7B": (18944, 3584), "up_proj 0.5B": (4864, 896)},
    "Qwen2.5-0.5B": fused(shapes.MODELS["Qwen2.5-0.5B"]),
    # The decoders of these are Qwen2.5's of the same size.
    "Qwen2.5-Omni-3B": fused(shapes.MODELS["Qwen2.5-3B"]),
    "Qwen2.5-Omni-7B": fused(shapes.MODELS["Qwen2.5-7B"]),
}
# text, image, video, audio, any, massive.
ROWS = 6


def generated(
    outputs: int, channels: int, group_size: int, seed: int, two_level: bool = False
) -> tuple[WeightRecord, ActivationRecord]:
    """Canonical records of a layer with random values, which take as long as calibrated ones. No token is massive.

    The layer with more inputs than outputs is down_proj; in serving, its input comes in channel order.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = weight_record(
        torch.randint(256, (outputs, channels // 2), generator=generator, dtype=torch.uint8),
        torch.full((outputs, channels // group_size), 8 if two_level else 0.01).to(
            torch.uint8 if two_level else torch.bfloat16
        ),
        torch.zeros(1, ROWS, outputs),
        torch.full((outputs,), 0.00125) if two_level else None,
    )
    record = ActivationRecord(
        inverse=torch.full((ROWS, channels), 3.0),
        centre=torch.zeros(ROWS, channels),
        mask=torch.rand(ROWS, channels, generator=generator) < 0.5,
        gain=torch.ones(ROWS),
        channel_order=(
            torch.arange(channels) if channels > outputs else torch.randperm(channels, generator=generator)
        ).int(),
        massive_channel=torch.arange(4, dtype=torch.int32)[None],
        massive_low=torch.full((1, 4), 1e30),
        massive_high=torch.full((1, 4), 2e30),
    )
    return weight, record
