"""The entry `triton` of ops.BACKENDS. Imports Triton only when a layer is loaded or run on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm import environment
from morphoquant_vllm.gpu import device, layout
from morphoquant_vllm.gpu import load_checks as checks
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord

# Tensors of a weight and an activation record, as `prepare` makes them.
RECORD_SIZES = (len(layout.GpuWeight._fields), len(layout.GpuActivation._fields))


def check(name: str, weight: WeightRecord, activation: ActivationRecord, dtype: torch.dtype) -> None:
    """Refuse what the kernels do not serve; raises MorphoQuantError naming the layer, the rule and the remedy."""
    checks.check_device(name, weight.codes.device)
    checks.check_layer(name, weight, activation, dtype)


def prepare(weight: WeightRecord, activation: ActivationRecord) -> tuple[list[Tensor], list[Tensor]]:
    """Canonical records in the kernels' layout; the canonical weights are not kept."""
    return list(layout.prepare_weight(weight)), list(layout.prepare_activation(activation))


def warm(weight: list[Tensor], activation: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
    """Compile every kernel that the layer can need, and refuse one that gives a wrong result on this GPU."""
    from morphoquant_vllm.gpu import launch, norm_launch, selfcheck

    profile = device.profile_of(weight[0].device)
    prepared = layout.GpuWeight(*weight), layout.GpuActivation(*activation)
    launch.warm(*prepared, bias, dtype, profile)
    if environment.fusion():
        norm_launch.warm(prepared[1], dtype, profile)
    selfcheck.check(*prepared, dtype, profile)


def act_quant(x: Tensor, modality: Tensor, activation: list[Tensor]) -> Tensor:
    """Codes int8 [M, K]."""
    from morphoquant_vllm.gpu import launch

    return launch.quantize(x, modality, layout.GpuActivation(*activation))[0]


def linear(x: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None) -> Tensor:
    """y [M, N] in the dtype of x."""
    from morphoquant_vllm.gpu import launch

    profile = device.profile_of(x.device)
    return launch.linear(x, modality, layout.GpuWeight(*weight), layout.GpuActivation(*activation), bias, profile)


def silu_mul_linear(
    gate_up: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None
) -> Tensor:
    """y [M, N] of silu(gate) * up, gate_up [M, 2K]: the quantizer computes it."""
    from morphoquant_vllm.gpu import launch

    profile = device.profile_of(gate_up.device)
    return launch.linear(
        gate_up, modality, layout.GpuWeight(*weight), layout.GpuActivation(*activation), bias, profile, silu_mul=True
    )


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    weight: list[Tensor],
    activation: list[Tensor],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] of the RMSNorm of x [M, K], or of x + residual, and then the new residual; the quantizer norms."""
    from morphoquant_vllm.gpu import norm_launch

    profile = device.profile_of(x.device)
    records = layout.GpuWeight(*weight), layout.GpuActivation(*activation)
    return norm_launch.norm_linear(x, residual, norm_weight, epsilon, modality, *records, bias, profile)
