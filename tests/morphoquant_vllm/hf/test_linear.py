"""The quantized linear of transformers: which numbers it computes on which device."""

import logging

import pytest
import torch
from torch import Tensor
from transformers import initialization

from morphoquant_vllm import backends
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.hf.linear import Mode, MorphoQuantLinear
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.linear import linear, output_bound
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, N, M = 128, 24, 40


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    return random_group([weight], settings(), spec(), torch.tensor(2))[0]


@pytest.fixture
def module(tensors: dict[str, Tensor]) -> MorphoQuantLinear:
    made = MorphoQuantLinear("layer", settings(), spec(), Mode(spec().any_row))
    made.load_state_dict(tensors)
    return made


def settings() -> LayerSpec:
    return LayerSpec(K, N, 32, "column", "layer")


def spec() -> QuantizationSpec:
    return QuantizationSpec(layers={"layer": settings()})


def input_in(dtype: torch.dtype) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(4)).to(dtype)


def defined(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    rows = torch.full((M,), spec().any_row, dtype=torch.int32)
    return linear(x, rows, weight_of(tensors), activation_of(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_of_the_device_compute_it(
    module: MorphoQuantLinear, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run here")
    x = input_in(dtype)
    weight, record = weight_of(tensors), activation_of(tensors)
    rows = token_rows(x, torch.full((M,), spec().any_row, dtype=torch.int32), record)
    expected = defined(x, tensors)
    bound = output_bound(act_quant(x, rows, record), rows, weight, record.gain, expected)
    y = module(x)
    assert module.prepared(x.device, dtype).backend == "cpu"
    assert y.dtype is dtype and bool(((y.double() - expected.double()).abs() <= bound).all())


def test_the_reference_computes_it_on_request_and_in_dtypes_without_kernels(
    module: MorphoQuantLinear, tensors: dict[str, Tensor]
) -> None:
    assert torch.equal(module(input_in(torch.float64)), defined(input_in(torch.float64), tensors))
    module.mode.reference = True
    x = input_in(torch.float32)
    assert torch.equal(module(x), defined(x, tensors))
    assert module._prepared is None, "kernels were prepared for nothing"


def test_a_layer_that_the_kernels_refuse_runs_on_the_reference_and_says_so_once(
    module: MorphoQuantLinear,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(name: str, *_: object) -> None:
        raise MorphoQuantError(f"{name}: this GPU is not known")

    refusing = backends.Backend(backends._reference_prepare, cpu.act_quant, cpu.linear, check=refuse)
    monkeypatch.setitem(backends.BACKENDS, "cpu", refusing)
    monkeypatch.setattr(cpu, "available", lambda: True)
    x = input_in(torch.float32)
    with caplog.at_level(logging.WARNING):
        outputs = module(x), module(x)
    assert all(torch.equal(y, defined(x, tensors)) for y in outputs)
    assert caplog.messages == ["layer: this GPU is not known (it runs on the torch reference, which is slow)"]


def test_a_model_may_draw_a_weight_that_is_not_there(module: MorphoQuantLinear, tensors: dict[str, Tensor]) -> None:
    """NanoChat and GPTBigCode draw the weights of some linears by name after a checkpoint was loaded."""
    initialization.normal_(module.weight, std=0.02)
    assert module.state_dict().keys() == tensors.keys()
    assert torch.equal(module(input_in(torch.float64)), defined(input_in(torch.float64), tensors))


def test_values_that_are_cast_or_moved_are_prepared_again(module: MorphoQuantLinear) -> None:
    x = input_in(torch.float32)
    before = module(x)
    module.to(torch.bfloat16)
    assert module._prepared is None
    module.get_buffer("absorbed_bias").add_(1.0)
    torch.testing.assert_close(module(x), before + 1.0)
