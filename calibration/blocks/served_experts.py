"""Quantized experts that replace the model's experts: later layers are then calibrated on served outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from calibration.blocks.served_linear import TokenRows
from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, input_holder, scale_scheme_of
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts_record
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record


def _prepared(name: str, record: ExpertsRecord, dtype: torch.dtype) -> backends.PreparedExperts:
    """The record for the kernels that serve its device, or for the torch reference if they refuse it."""
    try:
        return backends.prepare_experts(name, record, dtype)
    except MorphoQuantError:
        return backends.prepare_experts(name, record, dtype, "reference")


class ServedExperts(nn.Module):
    """The integer experts of a checkpoint's tensors, on the kernels of the device or on the torch reference.

    The reference computes if no kernels serve these experts and activations of `dtype`. `serving` gives the row of each
    token that is not massive. `tensors` holds those of each linear of the list of experts `name`.
    """

    def __init__(
        self,
        name: str,
        count: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        serving: TokenRows,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.prepared = _prepared(name, _record(name, count, tensors, device), dtype)
        self.serving = serving

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y [M, K] of hidden [M, K], in its dtype; index and weights [M, slots] are those of the router."""
        return self.prepared.experts(hidden, self.serving.modality_of(hidden), top_k_weights.float(), top_k_index)


def _record(name: str, count: int, tensors: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> ExpertsRecord:
    def weights(kind: str) -> list[WeightRecord]:
        found = [tensors[f"{name}.{expert}.{kind}"] for expert in range(count)]
        names = OUTPUT_TENSORS[scale_scheme_of(found[0])]
        return [weight_record(*(layer[tensor].to(device) for tensor in names)) for layer in found]

    def activation(linear: str) -> ActivationRecord:
        return activation_record(*(tensors[linear][tensor].to(device) for tensor in INPUT_TENSORS))

    return experts_record(
        weights("gate_proj"),
        weights("up_proj"),
        activation(input_holder(name)),
        weights("down_proj"),
        [activation(f"{name}.{expert}.down_proj") for expert in range(count)],
    )
