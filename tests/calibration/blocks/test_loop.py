"""The loop over the decoder: the inputs and targets of each linear."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from calibration.blocks import loop
from calibration.blocks.capture import MemoryInput, capture_block_inputs
from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.data.data_files import load_conversations
from calibration.data.rendering import Sample, build_samples
from calibration.data.token_choice import choose_tokens
from calibration.model.architectures import find_architecture
from calibration.model.block_loader import BlockLoader
from calibration.model.loading import load_front
from calibration.model.plan import decoder_names, plan
from calibration.model.source import open_source
from calibration.quantize import layer_report
from calibration.quantize.layer import DrawnInput, QuantizedLayer
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from morphoquant_vllm.host_memory import _malloc_trim
from tests.calibration.built_models import TinyModels

RECIPE = Recipe(device="cpu", sample_tokens=400)
ANY, MASSIVE = 4, 5
STATUS = Path("/proc/self/status")
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


class Run:
    """One calibration, with the arguments and results of `quantize_input`, by the name of its first linear."""

    def __init__(self, source_directory: Path, data: Path, monkeypatch: pytest.MonkeyPatch, massive: bool) -> None:
        self.seen: dict[str, DrawnInput] = {}
        self.made: dict[str, QuantizedLayer] = {}
        source = open_source(source_directory)
        architecture = find_architecture(source.config)
        self.samples: list[Sample] = build_samples(
            source_directory,
            load_conversations(data),
            max_tokens=2048,
            max_samples=None,
            placeholder_token_ids={},
            rows=DEFAULT_ROWS,
        )
        self.tokens = choose_tokens([sample.modality for sample in self.samples], RECIPE.sample_tokens, 1.0, 0)
        model = load_front(architecture, source, RECIPE)
        blocks = list(model.get_submodule(architecture.block_module).children())
        self.inputs: list[MemoryInput] = list(capture_block_inputs(model, blocks, self.samples, self.tokens.positions))
        names = decoder_names(architecture, source.config, source.tensors)
        if massive:
            for entry in self.inputs:
                entry.hidden[0, 0] *= 1000
        quantize_input = loop.quantize_input

        def watched(sample: DrawnInput, tokens, shards, spec, recipe, **options) -> dict[str, QuantizedLayer]:
            quantized = quantize_input(sample, tokens, shards, spec, recipe, **options)
            self.seen[next(iter(shards))] = sample
            self.made |= quantized
            return quantized

        monkeypatch.setattr(loop, "quantize_input", watched)
        self.results = list(
            loop.calibrate_blocks(
                BlockLoader(architecture, source, names, RECIPE),
                self.inputs,
                self.tokens,
                architecture=architecture,
                names=names,
                source=source,
                spec=plan(architecture, source.config, source.tensors, RECIPE),
                recipe=RECIPE,
            )
        )

    def inputs_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The inputs of each first linear for the chosen tokens when a whole model runs on the samples."""
        caught: dict[str, list[Tensor]] = {name: [] for name in self.seen}
        for name, parts in caught.items():
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, parts=parts: parts.append(inputs[0][0])
            )
        with torch.no_grad():
            for sample in self.samples:
                model(**sample.inputs)
        return {
            name: torch.cat([part[chosen] for part, chosen in zip(parts, self.tokens.positions, strict=True)])
            for name, parts in caught.items()
        }


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_every_linear_sees_the_served_model_and_aims_at_the_16_bit_one(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Any escape is far above the budget, so every input is warned of.
    monkeypatch.setattr(layer_report, "FAR_ABOVE", 0.0)
    run = Run(tiny.model("llama"), tiny.data("llama"), monkeypatch, massive=False)
    warned = [message.partition(": ")[0] for message in caplog.messages if "far above escape_budget" in message]
    shared = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert warned == [f"model.layers.{block}.{name}" for block in range(2) for name in shared]
    assert list(run.seen) == [f"model.layers.{block}.{name}" for block in range(2) for name in INPUTS]
    plain, served = (
        transformers.LlamaForCausalLM.from_pretrained(tiny.model("llama"), dtype=torch.float32).eval() for _ in range(2)
    )
    for name, layer in run.made.items():
        served.set_submodule(name, ServedLinear(layer.tensors, None, TokenRows(ANY), torch.device("cpu")))
    expected, x16 = run.inputs_of(served), run.inputs_of(plain)
    for name, sample in run.seen.items():
        # float32 sums in another order.
        assert gap(sample.sixteen_bit, x16[name]) < 1e-5, name
        off, distance = gap(sample.observation.drawn, expected[name]), gap(sample.observation.drawn, sample.sixteen_bit)
        assert off < 1e-4, name
        if name == "model.layers.0.self_attn.q_proj":
            assert distance < 1e-5, "nothing is quantized before it"
        else:
            assert distance > 2e-2, f"{name} must see what the linears before it lost, in its own block too"


def test_results_come_block_by_block_and_carry_the_inputs_on(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tiny.model("llama"), tiny.data("llama"), monkeypatch, massive=False)
    assert [(result.index, result.count, len(result.layers)) for result in run.results] == [(0, 2, 7), (1, 2, 7)]
    for result in run.results:
        errors = [layer.figures.output_error for layer in result.layers.values()]
        assert result.loss == pytest.approx(sum(errors) / 7)
    # The remaining states are those after the last block, 16 bit and served.
    assert all(0 < gap(entry.served, entry.hidden) < 1 for entry in run.inputs)


def test_tokens_with_an_outlying_residual_stream_are_massive(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tiny.model("llama"), tiny.data("llama"), monkeypatch, massive=True)
    first = torch.cat([chosen == 0 for chosen in run.tokens.positions])
    assert int(first.sum()) == len(run.samples) >= 2
    for sample in run.seen.values():
        assert torch.equal(sample.outlying, first)
        # The statistics of all tokens also separate them: they do not influence the steps.
        assert sorted(sample.observation.statistics) == [0, MASSIVE]
        assert sample.observation.statistics[MASSIVE].tokens == len(run.samples)
    ordinary = Run(tiny.model("llama"), tiny.data("llama"), monkeypatch, massive=False)
    assert not any(bool(sample.outlying.any()) for sample in ordinary.seen.values())
    assert all(list(sample.observation.statistics) == [0] for sample in ordinary.seen.values())


def test_what_forwards_freed_is_given_back_before_an_input_is_quantized(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes in the C library's heap, which it keeps (at K = 11008 they were two of seven gigabytes)."""
    if _malloc_trim() is None or not STATUS.is_file():
        pytest.skip("not glibc's heap")
    forward, quantize_input = loop.run_observed, loop.quantize_input
    kept: list[Tensor] = []
    resident: list[int] = []

    def leaves_holes(*arguments, **named) -> Tensor | None:
        if not kept:
            # Small enough to lie in the heap, whatever its threshold is by now; one in forty stays.
            parts = [torch.ones(24_000) for _ in range(2000)]
            kept.extend(parts[::40])
            del parts
            resident.append(anonymous())
        return forward(*arguments, **named)

    def watched(*arguments, **options) -> dict[str, QuantizedLayer]:
        resident.append(anonymous())
        return quantize_input(*arguments, **options)

    monkeypatch.setattr(loop, "run_observed", leaves_holes)
    monkeypatch.setattr(loop, "quantize_input", watched)
    Run(tiny.model("llama"), tiny.data("llama"), monkeypatch, massive=False)
    # Of 183 MiB of holes; what the tiny model takes is a few.
    assert resident[0] - resident[1] > 100 * 2**20


def anonymous() -> int:
    """Resident bytes of this process that no file holds."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
