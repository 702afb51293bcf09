from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.accuracy import language, simulation
from benchmarks.accuracy.methods import METHODS, Simulated
from benchmarks.models import decoder
from tests.tiny_models import build_tiny_llama

SIMULATED = {name: method for name, method in METHODS.items() if isinstance(method, Simulated)}
TOKENS = torch.randint(0, 200, (6, 48), generator=torch.Generator().manual_seed(0))
SAMPLES = [{"input_ids": ids[None]} for ids in TOKENS[:4]]
WINDOWS = TOKENS[4:].tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


def _apply(directory: Path, method: Simulated) -> tuple[nn.Module, dict]:
    model = decoder.load(directory)
    samples = SAMPLES if method.calibrated else []
    return model, simulation.apply(model, decoder.blocks_of(model, directory), method, samples)


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS[4:]).logits


def test_capture_and_run_are_the_models_own_forward(llama: Path) -> None:
    model = decoder.load(llama)
    blocks = decoder.blocks_of(model, llama)
    entries = decoder.capture(model, blocks, SAMPLES)
    for index, block in enumerate(blocks):
        groups, outputs = decoder.observe(block, index, entries)
        assert [group.names for group in groups] == [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ]
        for entry, hidden in zip(entries, outputs, strict=True):
            entry.hidden = hidden
    with torch.no_grad():
        expected = model.model(**SAMPLES[0]).last_hidden_state
        assert torch.equal(model.model.norm(entries[0].hidden), expected)


@pytest.mark.parametrize("name", SIMULATED)
def test_every_method_runs_and_all_but_16_bit_change_the_model(llama: Path, name: str) -> None:
    model, counting = _apply(llama, SIMULATED[name])
    logits, plain = _logits(model), _logits(decoder.load(llama))
    assert bool(logits.isfinite().all())
    assert torch.equal(logits, plain) == (name == "16bit")
    assert bool(counting) == (SIMULATED[name].activations == "oracle")
    if counting:
        # Each of the four inputs of each block, counted once: two windows of 48 tokens.
        assert [quantizer.total for quantizer in counting.values()] == [96 * 128, 96 * 128, 96 * 128, 96 * 256] * 2


@pytest.mark.parametrize("transform", ["hadamard", "smooth", "smooth-all"])
def test_a_transform_alone_leaves_the_model_as_it_is(llama: Path, transform: str) -> None:
    model, _ = _apply(llama, Simulated(transform=transform))
    # Only the order of float32 sums differs; logits have a deviation of about 4.
    torch.testing.assert_close(_logits(model), _logits(decoder.load(llama)), rtol=0, atol=2e-3)


def test_gptq_is_nearer_to_16_bit_than_rtn_on_its_calibration_data(llama: Path) -> None:
    plain = decoder.load(llama)
    errors = {}
    for name in ("w4a16-rtn-g64", "w4a16-gptq-g64"):
        model, _ = _apply(llama, SIMULATED[name])
        with torch.no_grad():
            errors[name] = sum(
                float((model.model(**x).last_hidden_state - plain.model(**x).last_hidden_state).square().sum())
                for x in SAMPLES
            )
    assert errors["w4a16-gptq-g64"] < errors["w4a16-rtn-g64"]


def test_window_losses_are_the_models_own_loss(llama: Path) -> None:
    model = decoder.load(llama)
    losses = language.window_losses(model, WINDOWS)
    with torch.no_grad():
        expected = [float(model(input_ids=ids[None], labels=ids[None]).loss) * 47 for ids in TOKENS[4:]]
    assert losses == pytest.approx(expected, rel=1e-5)
