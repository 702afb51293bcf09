"""The entry `triton` of backends.BACKENDS. Imports Triton only when a layer is loaded or run on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morphoquant_vllm.gpu import device, layout
from morphoquant_vllm.gpu import load_checks as checks
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord

if TYPE_CHECKING:
    from morphoquant_vllm.gpu import bound


def check(name: str, weight: WeightRecord, activation: ActivationRecord, dtype: torch.dtype) -> None:
    """Raise MorphoQuantError if the kernels do not serve the layer; it names the layer, the rule and the remedy."""
    checks.check_device(name, weight.codes.device)
    checks.check_layer(name, weight, activation, dtype)


def check_experts(name: str, record: ExpertsRecord, dtype: torch.dtype) -> None:
    """Raise MorphoQuantError if the kernels do not serve the experts; it names them, the rule and the remedy.

    It also raises if a kernel that they can need gives a wrong result on this GPU.
    """
    checks.check_device(name, record.down.codes.device)
    gate_up, down, intermediate = record.expert(0)
    checks.check_layer(name, gate_up, record.input, dtype)
    checks.check_layer(name, down, intermediate, dtype)
    from morphoquant_vllm.gpu import experts_check

    experts_check.check(name, record, dtype, device.profile_of(record.down.codes.device))


def prepare(weight: WeightRecord, activation: ActivationRecord) -> tuple[list[Tensor], list[Tensor]]:
    """Lay canonical records out for the kernels; the canonical weights are not kept."""
    return list(layout.prepare_weight(weight)), list(layout.prepare_activation(activation))


def bind(
    weight: list[Tensor], activation: list[Tensor], bias: Tensor | None, dtype: torch.dtype
) -> bound.BoundLayer | bound.JitLayer:
    """Bind the layer to compiled kernels, all that it can need.

    Raises MorphoQuantError if a kernel gives a wrong result on this GPU.
    """
    from morphoquant_vllm.gpu import bound, selfcheck

    profile = device.profile_of(weight[0].device)
    prepared = layout.GpuWeight(*weight), layout.GpuActivation(*activation)
    layer = bound.bind(*prepared, bias, dtype, profile)
    selfcheck.check(*prepared, dtype, profile)
    return layer


def act_quant(x: Tensor, modality: Tensor, activation: list[Tensor]) -> Tensor:
    """Codes int8 [M, K]."""
    from morphoquant_vllm.gpu import launch

    units = device.profile_of(x.device).units
    return launch.quantize(x, modality[: x.shape[0]], layout.GpuActivation(*activation), units=units)[0]


def linear(x: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None) -> Tensor:
    """y [M, N] in the dtype of x."""
    from morphoquant_vllm.gpu import launch

    prepared = layout.GpuWeight(*weight), layout.GpuActivation(*activation)
    return launch.linear(x, modality[: x.shape[0]], *prepared, bias, device.profile_of(x.device))


def silu_mul_linear(
    gate_up: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None
) -> Tensor:
    """y [M, N] of silu(gate) * up, which the quantizer computes from gate_up [M, 2K]."""
    from morphoquant_vllm.gpu import launch

    prepared = layout.GpuWeight(*weight), layout.GpuActivation(*activation)
    modality, profile = modality[: gate_up.shape[0]], device.profile_of(gate_up.device)
    return launch.linear(gate_up, modality, *prepared, bias, profile, silu_mul=True)
