"""AMD's zentorch linears as vLLM's "zen" extra calls them; ImportError if the package is not installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def _ops() -> torch._ops._OpNamespace:
    # Registers the operators.
    import zentorch  # noqa: F401

    return torch.ops.zentorch


def _repacked(outputs: int, channels: int) -> Tensor:
    codes = torch.randint(-8, 8, (outputs, channels), dtype=torch.int8)
    packed: Tensor = _ops().zentorch_woq_repack_weight(codes)
    return packed


def _scales(outputs: int, channels: int, group_size: int) -> Tensor:
    return torch.full((channels // group_size, outputs), 0.01, dtype=torch.bfloat16)


def w4a16(outputs: int, channels: int, group_size: int) -> Linear:
    """int4 weights, 16-bit activations."""
    run = _ops().zentorch_woq_linear
    weight, scale = _repacked(outputs, channels).t(), _scales(outputs, channels, group_size)
    return lambda x: run(x, weight, scale, None, None)


def w4a8(outputs: int, channels: int, group_size: int) -> Linear:
    """int4 weights, int8 activations of a dynamic scale per token."""
    run = _ops().zentorch_dynamic_qlinear
    weight, scale = _repacked(outputs, channels).view(torch.int8), _scales(outputs, channels, group_size)
    return lambda x: run(x, weight, scale, None)


def w8a8(outputs: int, channels: int) -> Linear:
    """int8 weights, int8 activations of a dynamic scale per token."""
    run = _ops().zentorch_dynamic_qlinear
    weight = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8)
    scale = torch.full((outputs,), 0.01, dtype=torch.bfloat16)
    return lambda x: run(x, weight, scale, None)
