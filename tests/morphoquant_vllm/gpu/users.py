"""What the interpreter process does with the callers of the backend beside vLLM: transformers and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from calibration.blocks.served_experts import ServedExperts
from calibration.blocks.served_linear import ServedLinear, TokenRows
from morphoquant_vllm import backends
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.gpu import experts_check
from morphoquant_vllm.hf.linear import Mode, MorphoQuantLinear
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from tests.checkpoints import random_group
from tests.experts import random_experts, random_routing, random_tokens
from tests.morphoquant_vllm.gpu.served import pretend
from tests.records import activation_of, weight_of

SHAPE = (96, 40)


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """A CPU passes for a GPU; the process serves other tests afterwards."""
    pretend("sm_90", 4)
    with (
        patch.dict(backends.BACKEND_OF_DEVICE, {"cpu": "triton"}),
        patch.object(backends.cpu, "available", lambda: False),
        # Tested by itself; interpreted it takes seconds.
        patch.object(experts_check, "check", lambda *_: None),
    ):
        yield


def _layer() -> tuple[dict[str, Tensor], QuantizationSpec]:
    settings = LayerSpec(*SHAPE, 32, "column", "layer", scale_scheme="two_level")
    spec = QuantizationSpec(layers={"layer": settings})
    weight = torch.randn(SHAPE[1], SHAPE[0], generator=torch.Generator().manual_seed(1))
    return random_group([weight], settings, spec, torch.tensor(2))[0], spec


def _error(module: nn.Module, tensors: dict[str, Tensor], rows: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of the module's outputs from the definition, over what output_bound allows."""
    x = torch.randn(rows.numel(), SHAPE[0], generator=torch.Generator().manual_seed(3)).to(dtype)
    weight, record = weight_of(tensors), activation_of(tensors)
    taken = activation_numerics.token_rows(x, rows, record)
    codes = activation_numerics.act_quant(x, taken, record)
    expected = linear_numerics.matmul(codes, taken, weight, record.gain, None).to(dtype)
    bound = linear_numerics.output_bound(codes, taken, weight, record.gain, expected)
    y: Tensor = module(x)
    assert y.dtype is dtype
    return float(((y.double() - expected.double()).abs() / bound).max())


@on_a_gpu()
def served_linear(dtype: torch.dtype) -> tuple[str, float]:
    """The backend of a layer in calibration's served stream, and its error."""
    tensors, spec = _layer()
    rows = (torch.arange(20) % 3).int()
    module = ServedLinear(tensors, None, TokenRows(spec.any_row, rows), torch.device("cpu"), dtype)
    backend = "" if module.prepared is None else module.prepared.backend
    return backend, _error(module, tensors, rows, dtype)


@on_a_gpu()
def served_experts(dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether calibration's experts run on the GPU's kernels, and whether their outputs are finite in `dtype`."""
    count, name = 4, "experts"
    tensors = {
        f"{name}.{index}.{projection}": linear
        for index, expert in enumerate(random_experts(count, 64, 128))
        for projection, linear in zip(("gate_proj", "up_proj", "down_proj"), expert, strict=True)
    }
    module = ServedExperts(name, count, tensors, TokenRows(4), torch.device("cpu"), dtype)
    weights, ids = random_routing(5, 2, count)
    y = module(random_tokens(5)[0].to(dtype), ids, weights)
    on_kernels = module.prepared.implementation is backends.BACKENDS["triton"].experts
    return on_kernels, y.dtype is dtype and bool(y.isfinite().all())


@on_a_gpu()
def loaded_linear(dtype: torch.dtype) -> tuple[str, float]:
    """The backend of a linear that transformers loaded, and its error."""
    tensors, spec = _layer()
    module = MorphoQuantLinear("layer", spec.layers["layer"], spec, Mode(spec.any_row))
    module.load_state_dict(tensors)
    error = _error(module, tensors, torch.full((20,), spec.any_row, dtype=torch.int32), dtype)
    return module.prepared(torch.device("cpu"), dtype).backend, error
