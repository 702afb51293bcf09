"""One pass forward and one back: the derivatives are those of the whole model, and predict the effect of errors."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from calibration.blocks import sensitivity
from calibration.blocks.capture import MemoryInput, capture_block_inputs
from calibration.blocks.sensitivity import Passes, choose_pass_samples
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from calibration.data.token_choice import choose_tokens
from calibration.model.architectures import find_architecture
from calibration.model.block_loader import BlockLoader
from calibration.model.loading import load_front
from calibration.model.plan import decoder_names
from calibration.model.source import open_source
from calibration.quantize.bit_losses import Probe
from calibration.quantize.output_metric import OutputMoment
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from tests.calibration.built_models import TinyModels

RECIPE = Recipe(device="cpu")
TEXT, IMAGE = 0, 1
SHARDS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def inputs_of(tiny: TinyModels, name: str) -> tuple[BlockLoader, list[MemoryInput]]:
    directory = tiny.model(name)
    source = open_source(directory)
    architecture = find_architecture(source.config)
    names = decoder_names(architecture, source.config, source.tensors)
    samples = build_samples(
        directory,
        load_conversations(tiny.data(name))[:3],
        max_tokens=2048,
        max_samples=None,
        placeholder_token_ids=architecture.placeholder_token_ids(source.config),
        rows=DEFAULT_ROWS,
    )
    tokens = choose_tokens([sample.modality for sample in samples], 100, 1.0, 0)
    model = load_front(architecture, source, RECIPE)
    blocks = list(model.get_submodule(architecture.block_module).children())
    captured = list(capture_block_inputs(model, blocks, samples, tokens.positions))
    return BlockLoader(architecture, source, names, RECIPE), captured


def passes_of(tiny: TinyModels, name: str, directory: Path) -> tuple[Passes, list[dict[str, Probe]]]:
    loader, captured = inputs_of(tiny, name)
    passes = Passes(loader, captured, directory, seed=3)
    for index in range(len(loader)):
        passes.forward(index)
    passes.start_back_from_projection(1.0)
    probes = [passes.backward(index, SHARDS) for index in reversed(range(len(loader)))]
    return passes, probes[::-1]


def last_states(loader: BlockLoader, sample: MemoryInput, changed: int = -1, error: Tensor | None = None) -> Tensor:
    """The decoder's last states, each divided by its size; `error` is added to the output of a block's down_proj."""
    state = sample.hidden
    for index in range(len(loader)):
        module = loader.load(index)
        if index == changed:
            module.mlp.down_proj.register_forward_hook(lambda m, x, y: y + error)
        with torch.no_grad():
            output = module(state, **sample.arguments[index])
        state = output if isinstance(output, Tensor) else output[0]
    return state / state.norm(dim=-1, keepdim=True)


def test_derivatives_are_those_of_the_whole_model(tiny: TinyModels, tmp_path: Path) -> None:
    passes, probes = passes_of(tiny, "llama", tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny.model("llama"), dtype=torch.float32)
    sample = passes.samples[0]
    outputs: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda m, x, y: outputs.append(y))
    hidden = sample.hidden.clone().requires_grad_()
    state = hidden
    for index, block in enumerate(model.model.layers):
        output = block(state, **sample.arguments[index])
        state = output if isinstance(output, Tensor) else output[0]
    # The same signs and weights as the first sample's.
    counts = [entry.modality.numel() for entry in passes.samples]
    signs = torch.randint(2, state.shape, generator=torch.Generator().manual_seed(3)).float() * 2 - 1
    total = (state / state.norm(dim=-1, keepdim=True) * signs * (1 / sum(counts)) ** 0.5).sum()
    expected = torch.autograd.grad(total, outputs)
    for probe, wanted in zip(probes, expected, strict=True):
        found = probe["mlp.down_proj"].gradient[: counts[0]]
        torch.testing.assert_close(found, wanted[0], rtol=1e-4, atol=1e-7)


def test_derivatives_predict_the_change_of_the_last_states(tiny: TinyModels, tmp_path: Path) -> None:
    """Of random errors of one linear's outputs, on average over the signs."""
    passes, probes = passes_of(tiny, "llama", tmp_path)
    loader, samples = passes.blocks, passes.samples
    total = sum(entry.modality.numel() for entry in samples)
    gradient = probes[0]["mlp.down_proj"].gradient
    error = 1e-3 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    predicted = float((error * gradient).sum(1).square().sum())
    parts = error.split([entry.modality.numel() for entry in samples])
    change = sum(
        float((last_states(loader, entry, 0, part) - last_states(loader, entry)).square().sum()) / total
        for entry, part in zip(samples, parts, strict=True)
    )
    assert 0.7 < predicted / change < 1.4


def test_small_derivatives_survive_in_float16(tiny: TinyModels, tmp_path: Path) -> None:
    """Of states so large that their derivatives are below what float16 can hold."""
    loader, captured = inputs_of(tiny, "llama")
    passes = Passes(loader, captured, tmp_path, seed=3)
    wide = [1e3 * sample.hidden for sample in captured]
    derivatives = []
    for dtype in (torch.float32, torch.float16):
        passes.states = [state.to(dtype) for state in wide]
        passes.start_back_from_projection(1.0)
        derivatives.append(torch.cat([state.flatten() for state in passes.states]).float())
    exact, rounded = derivatives
    assert float(exact.abs().max()) < 6e-5
    torch.testing.assert_close(rounded, exact / exact.abs().max(), rtol=2e-2, atol=1e-3)


def test_the_states_lie_in_files_that_are_removed(tiny: TinyModels, tmp_path: Path) -> None:
    passes, probes = passes_of(tiny, "llama", tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "sensitivity-00000.safetensors",
        *["sensitivity-00001.safetensors"],
    ]
    tokens = sum(entry.modality.numel() for entry in passes.samples)
    qkv = probes[1]["self_attn.qkv_proj"]
    assert qkv.x.shape[0] == qkv.gradient.shape[0] == tokens and qkv.gradient.shape[1] == qkv.matrix.shape[0]
    passes.clear()
    assert not list(tmp_path.iterdir())


def test_massive_tokens_are_left_out(tiny: TinyModels, tmp_path: Path) -> None:
    loader, captured = inputs_of(tiny, "llama")
    captured[0].hidden[0, 0] *= 1000
    passes = Passes(loader, captured, tmp_path, seed=3)
    for index in range(len(loader)):
        passes.forward(index)
    passes.start_back_from_projection(1.0)
    probe = passes.backward(1, SHARDS)["mlp.down_proj"]
    assert probe.x.shape[0] == sum(entry.modality.numel() for entry in captured) - 1


@pytest.mark.parametrize("massive", [False, True])
def test_metrics_are_those_of_the_derivatives_of_all_tokens(tiny: TinyModels, tmp_path: Path, massive: bool) -> None:
    """Of massive ones as well: later tokens may depend on them above all."""
    loader, captured = inputs_of(tiny, "llama")
    if massive:
        captured[0].hidden[0, 0] *= 1000
    found = []
    for wanted in ("probes", "metrics"):
        passes = Passes(loader, captured, tmp_path, seed=3)
        for index in range(len(loader)):
            passes.forward(index)
        passes.start_back(lambda sample, massive, last: torch.ones_like(last))
        found.append(passes.backward(1, SHARDS) if wanted == "probes" else passes.metrics(1, ["mlp.down_proj"]))
    probes, metrics = found
    moment = OutputMoment()
    moment.add(probes["mlp.down_proj"].gradient)
    expected = moment.metric()
    assert expected is not None and metrics.keys() == {"mlp.down_proj"}
    assert torch.allclose(metrics["mlp.down_proj"], expected, atol=1e-5) is not massive


@pytest.mark.parametrize("name", ["omni", "qwen3_vl", "qwen3_moe"])
def test_other_decoders(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    """Media, features added between blocks, and experts."""
    loader, captured = inputs_of(tiny, name)
    passes = Passes(loader, captured, tmp_path, seed=3)
    for index in range(len(loader)):
        passes.forward(index)
    passes.start_back_from_projection(1.0)
    for index in reversed(range(len(loader))):
        probe = passes.backward(index, {"self_attn.o_proj": ("self_attn.o_proj",)})["self_attn.o_proj"]
        assert bool(probe.gradient.isfinite().all()) and float(probe.gradient.abs().max()) > 0


def test_every_modality_gives_samples_and_long_ones_come_last() -> None:
    text, image = frozenset({TEXT}), frozenset({TEXT, IMAGE})
    assert choose_pass_samples([100, 200, 300], [text, text, text]) == [0, 1, 2]
    limit = sensitivity.BUDGET_TOKENS
    # Two of text would fill the budget; the picture comes second.
    assert choose_pass_samples([limit // 2, limit // 2, limit // 2], [text, text, image]) == [0, 2]
    # A sample that is too long is passed over, unless there is no other.
    assert choose_pass_samples([10 * limit, 100, limit], [text, text, text]) == [1]
    assert choose_pass_samples([10 * limit, 5 * limit], [text, text]) == [1]
    # Fewer tokens on request.
    assert choose_pass_samples([100, 100, 100], [text, text, text], most=200) == [0, 2]


def test_samples_are_spread_over_the_data() -> None:
    chosen = choose_pass_samples([512] * 80, [frozenset({TEXT})] * 80)
    assert len(chosen) == 8 and all(5 <= later - earlier <= 17 for earlier, later in pairwise(chosen))
