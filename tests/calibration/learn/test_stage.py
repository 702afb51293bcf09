"""Learning from end to end: what is learned, kept, resumed and exported, and when nothing learns."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calibration.calibrate import calibrate, plan_job
from calibration.learn import extent, run, stage
from calibration.learn.descent import Descent
from calibration.learn.extent import EXTENTS, choose_samples
from calibration.learn.model import Kept
from calibration.learn.run import LearningRun
from calibration.processes import ONE, Processes
from calibration.quantize.held_out import SAMPLES_PER_HELD
from calibration.settings.recipe import Recipe
from calibration.work.directory import WorkDirectory
from calibration.work.learned import LEARNED_FILE
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.calibration.joined import in_processes
from tests.calibration.killing import content

# All tokens are drawn: a fit to fewer would decide which scales learn.
RECIPE = Recipe(device="cpu", window_tokens=24, max_samples=21, sample_tokens=512, effort="best")
# Where the weights do not matter: the blocks take less time.
PLAIN = RECIPE.model_copy(update={"rounding": "nearest", "regression": False})
# One of eight samples judges.
STEPS, JUDGES = 19, 2
# Scales that are this much too large before they learn: an error that learning can undo in a few updates.
TOO_LARGE = 1.2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = [f"{int(number)}" for number in torch.randint(10000, (600,), generator=generator)]
    path.write_text(" ".join(words))
    return path


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent, "LEAST_TOKENS", 64)
    for effort, found in EXTENTS.items():
        monkeypatch.setitem(EXTENTS, effort, replace(found, most_passes=1))
    monkeypatch.setattr(run, "UPDATES_KEPT", 4)


def learn_at(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for effort, found in EXTENTS.items():
        monkeypatch.setitem(EXTENTS, effort, replace(found, learning_rate=rate))


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of outputs that are too large, and a rate that undoes it."""
    read = WorkDirectory.tensor

    def spoil(self: WorkDirectory, block: int | None, layer: str, tensor: str) -> Tensor:
        value = read(self, block, layer, tensor)
        return value * TOO_LARGE if tensor == "weight_channel_scale" else value

    monkeypatch.setattr(WorkDirectory, "tensor", spoil)
    learn_at(0.02, monkeypatch)


def make(tiny: TinyModels, text: Path, output: Path, recipe: Recipe = RECIPE, **options: Any) -> dict[str, Any]:
    return calibrate(tiny.model("llama"), text, output, recipe=recipe, **options)


@pytest.fixture(scope="module")
def plain(tiny: TinyModels, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of the same calibration without its last stage."""
    output = tmp_path_factory.mktemp("plain") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.calibrate.learn", lambda *arguments: None)
        # As few_tokens says: inputs share their escapes where steps and scales will learn.
        patch.setattr(extent, "LEAST_TOKENS", 64)
        make(tiny, text, output)
    return tensors(output)


def tensors(output: Path) -> dict[str, Tensor]:
    return {name: value for path in output.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.usefixtures("spoiled")
def test_it_learns_scales_that_are_too_large(
    tiny: TinyModels, text: Path, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    report = make(tiny, text, tmp_path / "best")
    found = report["learning"]
    assert found["samples"] == STEPS and found["judging_samples"] == JUDGES and found["steps"] == STEPS
    assert found["divergence_after"] < 0.8 * found["divergence_before"]
    verify_checkpoint(tmp_path / "best")
    learned = tensors(tmp_path / "best")
    kinds = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], learned[name])}
    assert {"weight_channel_scale", "absorbed_bias"} <= kinds
    assert kinds <= {"weight_channel_scale", "absorbed_bias", "activation_step"}
    scales = [name for name in plain if name.endswith("weight_channel_scale")]
    # Most outputs learn a scale below the one that is too large. Steps that grow, which keeps the rate of escapes, have
    # scales that grow as much; that is no change of the outputs.
    grown = {name: name.replace("weight_channel_scale", "activation_step") for name in scales}
    factors = [
        float((learned[name] / plain[name]).median() / (learned[grown[name]] / plain[grown[name]]).median()) / TOO_LARGE
        for name in scales
    ]
    assert sum(factor < 1 for factor in factors) > len(factors) / 2
    for name in plain:
        # The constant of massive tokens does not learn.
        if name.endswith("absorbed_bias"):
            assert torch.equal(learned[name][:, -1], plain[name][:, -1])


@pytest.mark.usefixtures("spoiled")
def test_the_default_learns_too(tiny: TinyModels, text: Path, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"effort": "default"})
    assert recipe == RECIPE.model_copy(update={"effort": Recipe().effort})
    found = make(tiny, text, tmp_path / "out", recipe)["learning"]
    assert found["samples"] == found["steps"] == STEPS and found["judging_samples"] == JUDGES
    assert found["divergence_after"] < 0.8 * found["divergence_before"]


class Stopped(Exception):
    """Ends a run between two updates."""


def stopped(tiny: TinyModels, text: Path, output: Path, monkeypatch: pytest.MonkeyPatch, updates: int) -> list[int]:
    """A run that ends after so many updates; the updates that it made."""
    update, made = LearningRun.update, list[int]()

    def stopping(self: LearningRun, index: int) -> None:
        if len(made) == updates:
            raise Stopped
        made.append(index)
        update(self, index)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LearningRun, "update", stopping)
        make(tiny, text, output, PLAIN)
    return made


@pytest.mark.usefixtures("spoiled")
def test_an_interrupted_run_learns_the_same_bytes(
    tiny: TinyModels, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny, text, tmp_path / "whole", PLAIN)
    update, made = LearningRun.update, stopped(tiny, text, tmp_path / "out", monkeypatch, 6)
    # With too little memory of the moment it does not end without learning, which would be other bytes.
    with monkeypatch.context() as patch:
        patch.setattr(stage, "learning_bytes", lambda *arguments: 2**50)
        with pytest.raises(MorphoQuantError, match=r"that needs 1048576.* free memory and run it again"):
            make(tiny, text, tmp_path / "out", PLAIN)
    monkeypatch.setattr(LearningRun, "update", lambda self, index: (made.append(index), update(self, index))[1])
    make(tiny, text, tmp_path / "out", PLAIN)
    # The two updates after the last kept state are made again.
    assert made == [*range(6), *range(4, STEPS)]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.usefixtures("spoiled")
def test_gradients_are_the_same_whatever_is_kept_in_memory(
    tiny: TinyModels, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[Kept, dict[str, Tensor | None]] = {}

    def compared(self: LearningRun, index: int) -> None:
        descent = self._descent
        assert descent is not None
        sample, target = descent.read(descent.order[index])
        for memory in Kept:
            descent.decoder.memory = memory
            descent.adam.zero_grad()
            states = descent.decoder.states(sample)
            assert states[-1].requires_grad == (memory is Kept.GRAPHS)
            _, by_last = descent.objective.derivatives(states[-1][0].detach(), target)
            descent.decoder.back(sample, states, by_last[None])
            found[memory] = {name: leaf.grad for name, leaf in descent.leaves.items()}
        raise Stopped

    monkeypatch.setattr(LearningRun, "update", compared)
    with pytest.raises(Stopped):
        make(tiny, text, tmp_path / "out", PLAIN)
    for name, gradient in found[Kept.ONE_BLOCK].items():
        assert gradient is not None and bool(gradient.any()), name
        for memory in (Kept.BLOCKS, Kept.GRAPHS):
            other = found[memory][name]
            assert other is not None and torch.equal(other, gradient), (memory, name)


@pytest.mark.parametrize("memory", Kept)
def test_as_much_is_kept_as_fits(memory: Kept, tiny: TinyModels) -> None:
    job = plan_job(tiny.model("llama"), RECIPE, None, ONE)
    chosen = choose_samples([24] * 21, RECIPE.effort)
    assert chosen is not None
    need = stage._need(job, [24] * 21, chosen)
    assert list(need) == list(Kept) and sorted(need.values()) == list(need.values())
    assert stage._most(need, need[memory]) is memory
    assert stage._most(need, need[Kept.ONE_BLOCK] - 1) is None


@pytest.mark.usefixtures("spoiled")
def test_what_learning_goes_on_from_is_checked_when_a_run_resumes(
    tiny: TinyModels, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny, text, tmp_path / "out", monkeypatch, 4)
    for name in ("learn-targets.safetensors", "learn-state.safetensors"):
        file = tmp_path / "out.work" / name
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(MorphoQuantError, match=rf"{name}: cannot be used \(its content has changed\)"):
            make(tiny, text, tmp_path / "out", PLAIN)
        file.write_bytes(kept)


@pytest.mark.usefixtures("spoiled")
def test_what_was_learned_is_checked_when_a_run_resumes(
    tiny: TinyModels, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("calibration.calibrate.export", lambda *arguments, **named: (_ for _ in ()).throw(Stopped))
        make(tiny, text, tmp_path / "out", PLAIN)
    work = tmp_path / "out.work"
    assert (work / LEARNED_FILE).exists() and not list(work.glob("learn-*"))
    file = work / "learned.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"x")
    with pytest.raises(MorphoQuantError, match=r"learned\.safetensors: cannot be used"):
        make(tiny, text, tmp_path / "out", PLAIN)
    file.write_bytes(kept)
    monkeypatch.setattr(stage, "LearningRun", None)
    assert make(tiny, text, tmp_path / "out", PLAIN)["learning"]["steps"] == STEPS


@pytest.mark.usefixtures("spoiled")
@pytest.mark.full
def test_two_processes_learn_what_one_learns(tiny: TinyModels, text: Path, tmp_path: Path) -> None:
    # Built before the processes fork, which would both build it.
    tiny.model("llama")
    call: Callable[[Processes], Any] = lambda processes: make(tiny, text, tmp_path / "two", processes=processes)  # noqa: E731
    first, second = in_processes(tmp_path, call)
    assert first == second and first["learning"]["divergence_after"] < first["learning"]["divergence_before"]
    verify_checkpoint(tmp_path / "two")


def test_if_the_divergence_does_not_fall_nothing_is_changed(
    tiny: TinyModels,
    text: Path,
    plain: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    learn_at(0.5, monkeypatch)
    caplog.set_level("INFO")
    report = make(tiny, text, tmp_path / "best")
    assert "learning: mean of the later updates, divergence of judging samples" in caplog.text
    assert re.search(r"learning: update 4 of 19, about \d+ s left", caplog.text)
    assert report["learning"]["divergence_after"] == report["learning"]["divergence_before"]
    assert "nothing is changed; more samples may help" in caplog.text
    learned = tensors(tmp_path / "best")
    assert all(torch.equal(learned[name], plain[name]) for name in plain)


def test_a_divergence_that_is_no_number_makes_no_step(
    tiny: TinyModels, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Descent.judge
    monkeypatch.setattr(Descent, "judge", lambda self: replace(judge(self), divergence=float("nan")))
    monkeypatch.setattr(Descent, "update", None)
    found = make(tiny, text, tmp_path / "out", PLAIN)["learning"]
    assert found["divergence_before"] is None and found["divergence_after"] is None
    assert "the divergence of judging samples is nan at the start, so no update is made" in caplog.text


def test_too_few_samples_learn_nothing_and_a_line_says_so(
    tiny: TinyModels, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for effort in EXTENTS:
        recipe = RECIPE.model_copy(update={"max_samples": SAMPLES_PER_HELD - 1, "effort": effort})
        assert "learning" not in make(tiny, text, tmp_path / effort, recipe)
        assert f"effort {effort}: steps and scales do not learn: give {SAMPLES_PER_HELD} samples or more" in caplog.text


@pytest.mark.full
def test_experts_do_not_learn_and_a_line_says_so(
    tiny: TinyModels, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = calibrate(tiny.model("qwen3_moe"), text, tmp_path / "out", recipe=RECIPE)
    assert "learning" not in report and "the decoder has experts, which cannot learn" in caplog.text


@pytest.mark.full
def test_too_little_memory_learns_nothing_and_a_line_says_so(
    tiny: TinyModels, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage, "learning_bytes", lambda *arguments: 2**50)
        patch.setattr("calibration.calibrate.quantize", lambda *arguments: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            make(tiny, text, tmp_path / "best", PLAIN)
    assert "that needs 1048576" in caplog.text
    # Decided once: a resumed run writes the same bytes, whatever memory is free by then.
    assert "learning" not in make(tiny, text, tmp_path / "best", PLAIN)
