"""The memory of a calibration; keeping data in memory or on disk changes no byte."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibration import calibrate as calibrate_module
from calibration import stages
from calibration.blocks.memory_need import MemoryNeed, input_peak, memory_need
from calibration.calibrate import calibrate, dry_run
from calibration.data.data_files import load_conversations
from calibration.data.rendering import Sample, without_values
from calibration.data.token_choice import DrawnTokens
from calibration.forecast import Forecast, forecast
from calibration.job import Job
from calibration.model.architectures import find_architecture
from calibration.model.block_loader import BlockLoader
from calibration.model.plan import decoder_names, plan
from calibration.model.source import open_source
from calibration.processes import ONE
from calibration.settings.recipe import Recipe
from calibration.work.directory import WorkDirectory
from calibration.work.hidden_states import DiskInput
from calibration.work.rendered import StoredInputs
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels
from tests.calibration.killing import content

EFFORTS = ("fast", "default", "best")
RECIPE = Recipe(device="cpu", sample_tokens=64, max_samples=2)


def job_of(model: Path, budget: int | None = None, device: str = "cpu", recipe: Recipe = RECIPE) -> Job:
    """Not `plan_job`'s, which asks torch for the device."""
    source = open_source(model)
    architecture = find_architecture(source.config)
    names = decoder_names(architecture, source.config, source.tensors)
    spec = plan(architecture, source.config, source.tensors, recipe)
    return Job(source, architecture, names, spec, recipe, budget, torch.device(device), ONE)


def need_of(model: Path, recipe: Recipe, tokens: int, *, joint: bool = False) -> MemoryNeed:
    job = job_of(model, recipe=recipe)
    return memory_need(job.architecture, job.source.tensors, job.names, job.spec, recipe, tokens, joint=joint)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("qwen2_5_vl", "bfloat16")])
def test_hidden_states_on_disk_give_the_bytes_of_those_in_memory(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    recipe = RECIPE.model_copy(update={"dtype": dtype})
    used: list[set[str]] = []
    inputs = WorkDirectory.inputs

    def watched(self: WorkDirectory, *, in_memory: bool) -> Any:
        found = inputs(self, in_memory=in_memory)
        used.append({type(entry).__name__ for entry in found})
        return found

    monkeypatch.setattr(WorkDirectory, "inputs", watched)
    calibrate(tiny.model(name), tiny.data(name), tmp_path / "memory", recipe=recipe)
    need = need_of(tiny.model(name), recipe, 66)
    # All but the hidden states fits.
    budget = need.least
    calibrate(tiny.model(name), tiny.data(name), tmp_path / "disk", recipe=recipe, memory_budget=budget)
    assert used == [{"MemoryInput"}, {DiskInput.__name__}]
    assert content(tmp_path / "disk") == content(tmp_path / "memory")


@pytest.mark.parametrize("towers", [(), ("image",)])
def test_pixels_on_disk_give_the_bytes_of_those_in_memory(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: tuple[str, ...]
) -> None:
    recipe = RECIPE.model_copy(update={"towers": towers, "max_samples": 4})
    model, data, front = tiny.model("qwen2_5_vl"), tiny.data("qwen2_5_vl"), stages._run_front
    kinds: list[set[str]] = []

    def watched(job: Job, work: WorkDirectory, loaded: Any, samples: Sequence[Sample], tokens: DrawnTokens) -> Any:
        kinds.append({type(sample.inputs).__name__ for sample in samples if "pixel_values" in sample.inputs})
        return front(job, work, loaded, samples, tokens)

    def left(_: Any) -> None:
        assert not list((tmp_path / "disk.work").glob("rendered-*"))

    monkeypatch.setattr(stages, "_run_front", watched)
    calibrate(model, data, tmp_path / "disk", recipe=recipe, on_block=left)
    monkeypatch.setattr(stages, "store_media", lambda folder, place, inputs: inputs)
    calibrate(model, data, tmp_path / "memory", recipe=recipe)
    assert kinds == [{StoredInputs.__name__}, {"dict"}]
    assert content(tmp_path / "disk") == content(tmp_path / "memory")


def test_a_dry_run_counts_pixels_and_keeps_none(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def watched(job: Job, tokens: DrawnTokens, rendered: int) -> Forecast:
        found.append(rendered)
        return forecast(job, tokens, rendered)

    for module in (stages, calibrate_module):
        monkeypatch.setattr(module, "forecast", watched)
    places = (tiny.model("qwen2_5_vl"), tiny.data("qwen2_5_vl"), tmp_path / "out")
    expected = dry_run(*places, recipe=RECIPE)
    assert not list(tmp_path.iterdir())
    calibrate(*places, recipe=RECIPE)
    # The files have headers and tokens, too.
    assert 0 < found[0] < found[1] < 1.5 * found[0]
    job = job_of(places[0])
    tokens = stages.prepare(job, load_conversations(places[1]), without_values)[1]
    assert forecast(job, tokens, 10**12).work > 10**12 > expected.work


def test_one_block_at_a_time_is_in_memory(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted when each block is loaded: the decoder's parameters that are not on the meta device."""
    load, loaded = BlockLoader.load, list[weakref.ref[nn.Module]]()
    alive: list[int] = []

    def watched(self: BlockLoader, index: int) -> nn.Module:
        block = load(self, index)
        # No garbage collection runs here: tensors in reference cycles count too.
        alive.append(sum(other() is not None for other in loaded))
        loaded.append(weakref.ref(block))
        held = sum(
            parameter.numel()
            for found in gc.get_objects()
            if issubclass(type(found), nn.Linear | nn.Embedding)
            for parameter in found.parameters()
            if parameter.device.type != "meta"
        )
        # A decoder linear of another block, a tower or an embedding would be in it.
        assert held == sum(p.numel() for m in block.modules() if isinstance(m, nn.Linear) for p in m.parameters())
        return block

    monkeypatch.setattr(BlockLoader, "load", watched)
    gc.collect()
    others = [found for found in gc.get_objects() if issubclass(type(found), nn.Linear | nn.Embedding)]
    assert not any(parameter.device.type != "meta" for found in others for parameter in found.parameters())
    calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / "out", recipe=RECIPE)
    assert alive == [0, 0]


def test_a_model_that_does_not_fit_the_budget_is_refused_with_the_sizes(tiny: TinyModels, tmp_path: Path) -> None:
    model, data = tiny.model("omni"), tmp_path / "none.jsonl"
    # Not so much as rendered: its media do not exist.
    data.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    expected = (
        r"omni: does not fit --memory-budget 0.50GiB: .* take 0\.\d\dGiB; raise the budget, or pass --dtype bfloat16$"
    )
    with pytest.raises(MorphoQuantError, match=expected):
        calibrate(model, data, tmp_path / "out", recipe=RECIPE, memory_budget=2**29)
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (None, "does not fit the GPU's 0.50GiB of free memory: .* pass --device cpu, or pass --dtype bfloat16$"),
        (2**30, "does not fit the GPU's 0.50GiB of free memory"),
        (2**28, "does not fit --memory-budget 0.25GiB: .* raise the budget"),
    ],
)
def test_the_memory_of_a_gpu_is_looked_at_before_any_work(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, budget: int | None, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**28, 2**31))
    # Memory that torch keeps is free for this process.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**28)
    job = job_of(tiny.model("omni"), budget, "cuda:0")
    assert job.device_limit == min(budget or 2**29, 2**29)
    with pytest.raises(MorphoQuantError, match=message):
        job.memory_need()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**35))
    if budget != 2**28:
        assert job.memory_need().block > 0


def test_a_refusal_names_as_many_drawn_tokens_as_fit(tiny: TinyModels) -> None:
    drawn = 100_000
    positions, alike = torch.arange(drawn), torch.full((drawn,), 1 / drawn)
    tokens = DrawnTokens((positions,), torch.zeros(drawn, dtype=torch.int32), alike, {0: drawn})
    model = tiny.model("omni")

    def refusal(budget: int) -> str:
        with pytest.raises(MorphoQuantError) as error:
            job_of(model, budget).memory_need(tokens)
        return str(error.value).rpartition("; ")[2]

    def need(count: int) -> int:
        return need_of(model, RECIPE, count).block

    assert job_of(model).memory_need(tokens).block > need(drawn // 2)
    # The first token of the sample comes beside them.
    assert refusal(need(drawn // 4 + 1)) == "raise the budget, or pass --sample-tokens 25000"
    assert refusal(need(drawn // 4)) == "raise the budget, or pass --sample-tokens 12500"
    assert refusal(job_of(model).memory_need().front_streamed + 1) == "raise the budget"


def test_the_need_grows_with_what_is_held(tiny: TinyModels) -> None:
    small, large = (need_of(tiny.model("omni"), RECIPE, tokens) for tokens in (1000, 100_000))
    assert large.front == small.front > small.front_streamed
    # At least the served and the 16-bit values of the widest input, in float32.
    assert large.block - small.block > 2 * 4 * 99_000 * 256
    half = need_of(tiny.model("omni"), Recipe(device="cpu", dtype="bfloat16"), 1000)
    weights = sum(
        info.nbytes for name, info in open_source(tiny.model("omni")).tensors.items() if "thinker.audio" in name
    )
    assert small.front - half.front > weights / 2


@pytest.mark.parametrize(
    ("tokens", "k", "n", "measured"),
    [
        (1024, 4096, 128, 307),
        (16384, 1024, 128, 297),
        (2048, 1024, 4096, 297),
        (4096, 3072, 512, 348),
        (4096, 2048, 8192, 850),
        (16384, 11008, 2048, 3758),
    ],
)
def test_the_formula_covers_what_was_measured(tokens: int, k: int, n: int, measured: int) -> None:
    """MiB by which resident memory rose, tokens included, when one input was quantized (G = 32, two modalities)."""
    assert measured < input_peak(tokens, k, n, 32) / 2**20 < 1.25 * measured


def test_metrics_of_outputs_take_room(tiny: TinyModels) -> None:
    k, n, squares = 4096, 6144, 4096**2 + 2 * 1024**2
    # Runs of an eighth of the outputs need less than half as much for the fits.
    more = input_peak(2048, k, n, 32, metrics=squares) - input_peak(2048, k, n, 32)
    assert more == 4 * (4 * squares + k * k - 5.5 * n * k)
    model = tiny.model("llama")
    plain, joint = need_of(model, RECIPE, 1000), need_of(model, RECIPE, 1000, joint=True)
    assert plain.head == 0 and joint.block > plain.block
    # The head, twice, in float32, and logits of 128 tokens.
    assert (joint.front, joint.front_streamed) == (plain.front, plain.front_streamed)
    assert joint.head - plain.front > 4 * 3 * 128 * 100


def test_too_few_samples_to_hold_one_out_give_the_tensors_of_fast_and_lines(
    tiny: TinyModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for effort in EFFORTS:
        recipe = RECIPE.model_copy(update={"effort": effort})
        report = calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / effort, recipe=recipe)
        assert report["settings"]["effort"] == effort
    fast, *others = (content(tmp_path / effort) for effort in EFFORTS)
    weights = [name for name in fast if name.endswith(".safetensors")]
    assert weights and all(fast[name] == other[name] for name in weights for other in others)
    said = [line.message for line in caplog.records if line.message.startswith("effort")]
    for effort, line in zip(EFFORTS[1:], said, strict=True):
        assert line.startswith(f"effort {effort}: steps and scales do not learn: give 8 samples or more")
