"""Floors: a checkpoint's parts in the 16-bit model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import parts
from benchmarks.accuracy.methods import KINDS
from benchmarks.models import decoder
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.hf import MorphoQuantLinear
from morphoquant_vllm.numerics.activation import act_quant, dequantize, token_rows
from tests.calibration.built_models import TinyModels

# Each test loads a calibrated checkpoint.
pytestmark = pytest.mark.slow

IDS = torch.arange(20, 60)[None]
RECIPE = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModels(tmp_path_factory.mktemp("source")).model("llama")


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    calibrate(source, TinyModels(folder).data("llama"), folder / "quantized", recipe=RECIPE)
    return folder / "quantized"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def test_a_kind_of_linear_alone_is_quantized(source: Path, checkpoint: Path) -> None:
    plain, whole = logits(decoder.load(source)), logits(parts.load(checkpoint))
    seen = []
    for kind, names in KINDS.items():
        model = parts.load_part(checkpoint, source, kind)
        quantized = [name for name, module in model.named_modules() if isinstance(module, MorphoQuantLinear)]
        assert len(quantized) == 2 * len(names) and all(name.endswith(names) for name in quantized)
        seen.append(logits(model))
        assert not torch.equal(seen[-1], plain) and not torch.equal(seen[-1], whole)
    assert all((own - plain).norm() < (whole - plain).norm() for own in seen)


def test_activations_alone_err_as_their_codes_do(source: Path, checkpoint: Path) -> None:
    model, original, quantized = (
        parts.load_part(checkpoint, source, "activations"),
        *map(decoder.load, (source, checkpoint)),
    )
    name = "model.layers.0.mlp.down_proj"
    own, plain, both = (each.get_submodule(name) for each in (model, original, quantized))
    assert isinstance(own, parts.CodedActivations)
    x = torch.randn(1, 50, plain.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, coded, served = plain(x), own(x), both(x)
    # Weights of 4 bits err beside the activations.
    assert 0 < (coded - exact).norm() < (served - exact).norm()


def test_activations_that_the_grid_holds_stay_as_they_are(source: Path, checkpoint: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    own = parts.load_part(checkpoint, source, "activations").get_submodule(name)
    assert isinstance(own, parts.CodedActivations)
    step, centre = (
        own.quantized.get_buffer("activation_step"),
        own.quantized.get_buffer("centre")[own.quantized.mode.row],
    )
    codes = torch.randint(-7, 8, (9, own.original.in_features), generator=torch.Generator().manual_seed(0))
    gain = own.quantized.get_buffer("gain")[own.quantized.mode.row]
    x = codes * (step * gain) + centre
    with torch.no_grad():
        torch.testing.assert_close(own(x[None])[0], own.original(x), rtol=1e-4, atol=1e-4)


def test_weights_alone_compute_as_the_checkpoint_does_where_the_grid_holds_the_inputs(
    source: Path, checkpoint: Path
) -> None:
    name = "model.layers.0.mlp.down_proj"
    own = parts.load_part(checkpoint, source, "weights").get_submodule(name)
    assert isinstance(own, parts.ServedWeights)
    record = own.quantized.activation()
    x = torch.randn(50, own.quantized.in_features, generator=torch.Generator().manual_seed(0))
    held = torch.empty_like(x)
    rows = token_rows(x, own.quantized.modality_of(x), record)
    held[:, record.channel_order.long()] = dequantize(act_quant(x, rows, record), rows, record)
    with torch.no_grad():
        torch.testing.assert_close(own(held[None])[0], own.quantized(held), rtol=1e-4, atol=1e-4)
        # Inputs between the codes are not rounded.
        assert not torch.allclose(own(x), own.quantized(x), rtol=1e-4, atol=1e-4)


def test_the_16_bit_model_is_loaded_too(source: Path) -> None:
    """It is served beside the checkpoints, and has no quantized linear."""
    assert torch.equal(logits(parts.load(source)), logits(decoder.load(source)))
