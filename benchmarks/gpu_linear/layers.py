"""The timed layers: each function builds one layer of random weights and returns a call on x, or the reason why not.

Ours include quantizing their activations, as in a server. The peers stand in peers.py.
"""

from __future__ import annotations

import torch

from benchmarks.gpu_linear.peers import PEERS, Builder, Built, Call
from morphoquant_vllm import backends, ops
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record

# Rows of a checkpoint: text, image, video, audio, any, massive.
ROWS = 6


def bfloat16(out_features: int, in_features: int, group_size: int) -> Built:
    """cuBLAS."""
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def _activation(out_features: int, in_features: int) -> ActivationRecord:
    """An activation record in which every channel may escape, with one set of massive intervals.

    Among the measured layers, only down has more inputs than outputs. As in a server, its input comes in channel order.
    """
    device = "cuda"
    order = torch.arange if in_features > out_features else torch.randperm
    return ActivationRecord(
        inverse=torch.full((ROWS, in_features), 3.0, device=device),
        centre=torch.zeros(ROWS, in_features, device=device),
        mask=torch.ones(ROWS, in_features, dtype=torch.bool, device=device),
        gain=torch.ones(ROWS, device=device),
        channel_order=order(in_features, device=device).int(),
        massive_channel=torch.arange(4, device=device).int()[None],
        massive_low=torch.full((1, 4), 1e3, device=device),
        massive_high=torch.full((1, 4), 2e3, device=device),
    )


def _ours(weight: WeightRecord, out_features: int, in_features: int) -> Call:
    """A bound layer: quantizer, product and, if K is split, the reduction."""
    activation = _activation(out_features, in_features)
    backend = backends.BACKENDS["triton"]
    backend.check("benchmark", weight, activation, torch.bfloat16)
    handle = ops.bind(*backend.prepare(weight, activation), None, torch.bfloat16, "triton")
    modality = torch.full((65536,), ROWS - 2, dtype=torch.int32, device="cuda")
    return lambda x: ops.bound_linear(x, modality, handle, None)


def morphoquant(out_features: int, in_features: int, group_size: int) -> Built:
    """Ours with group scales."""
    weight = weight_record(
        torch.randint(256, (out_features, in_features // 2), device="cuda").to(torch.uint8),
        (torch.rand(out_features, in_features // group_size, device="cuda") / 100 + 0.001).bfloat16(),
        torch.zeros(1, ROWS, out_features, device="cuda"),
    )
    return _ours(weight, out_features, in_features)


def morphoquant_two_level(out_features: int, in_features: int, group_size: int) -> Built:
    """Ours with two-level scales."""
    weight = WeightRecord(
        torch.randint(256, (out_features, in_features // 2), device="cuda").to(torch.uint8),
        torch.randint(1, 17, (out_features, in_features // group_size), device="cuda").to(torch.uint8),
        torch.rand(out_features, device="cuda") / 1000 + 0.0001,
        torch.zeros(ROWS, out_features, device="cuda"),
    )
    return _ours(weight, out_features, in_features)


LAYERS: dict[str, Builder] = {
    "bf16": bfloat16,
    "morphoquant": morphoquant,
    "morphoquant-two-level": morphoquant_two_level,
    **PEERS,
}
