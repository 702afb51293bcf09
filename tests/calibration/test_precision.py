"""`bits_budget` from end to end: what is chosen, kept, resumed, exported and reloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import morphoquant_vllm.hf as hf
from calibration.blocks.loop import BlockResult
from calibration.blocks.sensitivity import choose_pass_samples
from calibration.calibrate import calibrate, dry_run
from calibration.model.bits import mean_bits
from calibration.processes import Processes
from calibration.quantize.escape_prices import EscapeCosts
from calibration.settings.recipe import Recipe
from calibration.work.budgets import BUDGETS_FILE
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import check_headers, read_spec
from morphoquant_vllm.format.files import REPORT_FILE
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.calibration.joined import in_processes
from tests.calibration.killing import content
from tests.calibration.mixed import FORMS, calibrate_mixed
from tests.reference_model import Checkpoint, swap_linears

PREFIX = "model.layers"
BUDGET = Recipe(device="cpu", sample_tokens=64, max_samples=2, bits_budget=5.9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a budget, made in one go."""
    output = tmp_path_factory.mktemp("whole") / "out"
    calibrate(tiny.model("llama"), tiny.data("llama"), output, recipe=BUDGET)
    return output


def run(tiny: TinyModels, output: Path, recipe: Recipe = BUDGET, **options: Any) -> dict[str, Any]:
    return calibrate(tiny.model("llama"), tiny.data("llama"), output, recipe=recipe, **options)


def test_a_budget_is_nearly_used_and_kept(whole: Path) -> None:
    spec = verify_checkpoint(whole)
    bits = json.loads((whole / REPORT_FILE).read_text())["bits"]
    wide = {layer.shared_input for layer in spec.layers.values() if layer.weight_bits == 8}
    assert wide == set(bits["eight_bit"]) and wide and len(wide) < 8
    assert not bits["sixteen_bit"] and len(spec.layers) == 14
    assert 5.3 < bits["mean"] <= 5.9 and bits["mean"] == pytest.approx(mean_bits(spec.layers.values()))


def test_without_a_budget_nothing_of_it_is_written(tiny: TinyModels, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", BUDGET.model_copy(update={"bits_budget": None}))
    assert not {"bits", "escape_budgets"} & report.keys()
    assert not {"bits_budget", "budget"} & report["settings"].keys()
    assert {layer.weight_bits for layer in read_spec(tmp_path / "out").layers.values()} == {4}
    assert "weight_bits" not in (tmp_path / "out" / "config.json").read_text()


class Stopped(Exception):
    """Ends a run after a block."""


def stop(result: BlockResult) -> None:
    raise Stopped


def test_a_resumed_run_keeps_its_choice(tiny: TinyModels, whole: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(Stopped):
        run(tiny, tmp_path / "out", on_block=stop)
    work = tmp_path / "out.work"
    assert (work / BUDGETS_FILE).exists() and not list(work.glob("sensitivity-*"))
    kept = (work / BUDGETS_FILE).read_bytes()
    (work / BUDGETS_FILE).unlink()
    with pytest.raises(MorphoQuantError, match=r"budgets\.json: cannot be used \(it is missing\).*--restart"):
        run(tiny, tmp_path / "out")
    (work / BUDGETS_FILE).write_bytes(kept)
    monkeypatch.setattr("calibration.precision.measure", _not_again)
    run(tiny, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole) and not work.exists()


def _not_again(*arguments: Any) -> Any:
    raise AssertionError("the choice was made again")


@pytest.mark.full
def test_a_run_that_ends_while_it_chooses_makes_the_same_choice(
    tiny: TinyModels, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("calibration.blocks.sensitivity.Passes.start_back_from_projection", killed)
        run(tiny, tmp_path / "out")
    assert list((tmp_path / "out.work").glob("sensitivity-*"))
    run(tiny, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole) and list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.full
def test_two_processes_choose_what_one_chooses(tiny: TinyModels, whole: Path, tmp_path: Path) -> None:
    call: Callable[[Processes], Any] = lambda processes: run(tiny, tmp_path / "two", processes=processes)  # noqa: E731
    results = in_processes(tmp_path, call)
    assert results[0] == results[1]
    assert results[0]["bits"] == json.loads((whole / REPORT_FILE).read_text())["bits"]
    assert verify_checkpoint(tmp_path / "two").layers == read_spec(whole).layers


@pytest.mark.full
def test_two_processes_round_with_the_metrics_of_one(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.quantize.output_metric.LEAST_RUN", 8)
    one = learned(tiny, tmp_path, "one")
    call: Callable[[Processes], Any] = lambda processes: learned(tiny, tmp_path, "two", processes=processes)  # noqa: E731
    first, second = in_processes(tmp_path, call)
    assert first == second and verify_checkpoint(tmp_path / "two").layers == read_spec(tmp_path / "one").layers
    # Sums in another order turn codes at ties, and all layers after them.
    for name, layer in one["layers"].items():
        assert first["layers"][name]["output_error"] == pytest.approx(layer["output_error"], rel=0.1)


def test_one_budget_of_escapes_for_the_model(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = Recipe(device="cpu", sample_tokens=64, max_samples=2, budget="model")
    report = run(tiny, tmp_path / "out", recipe)
    budgets = report["escape_budgets"]
    spec = verify_checkpoint(tmp_path / "out")
    assert budgets.keys() == spec.shared_inputs().keys() and len(set(budgets.values())) > 2
    channels = {layer.shared_input: layer.in_features for layer in spec.layers.values()}
    mean = sum(budgets[name] * count for name, count in channels.items()) / sum(channels.values())
    assert 0.03 < mean <= 0.04
    # Each input keeps its own budget on the tokens of the search.
    for name, layer in spec.layers.items():
        rates = report["layers"][name]["escape_rate"]
        massive = rates.get("massive", 0.0) * report["layers"][name]["massive_tokens"] / 66
        assert rates["all"] - massive <= budgets[layer.shared_input] + 0.03, name


LEARNING = Recipe(device="cpu", sample_tokens=256, window_tokens=640, max_samples=8)


def learned(tiny: TinyModels, folder: Path, name: str, recipe: Recipe = LEARNING, **options: Any) -> dict[str, Any]:
    """Calibrate with as many samples as learning takes."""
    data = folder / "text.txt"
    data.write_text("the quick brown fox jumps over a lazy dog. " * 1500)
    return calibrate(tiny.model("llama"), data, folder / name, recipe=recipe, **options)


def test_metrics_of_outputs_are_kept_and_resumed(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_from = []

    def choosing(lengths: list[int], *arguments: Any) -> list[int]:
        chosen_from.append(len(lengths))
        return choose_pass_samples(lengths, *arguments)

    monkeypatch.setattr("calibration.precision.choose_pass_samples", choosing)
    learned(tiny, tmp_path, "whole")
    # For budgets, and for metrics without the sample that judges.
    assert chosen_from == [8, 7]
    with pytest.raises(Stopped):
        learned(tiny, tmp_path, "out", on_block=stop)
    files = sorted((tmp_path / "out.work").glob("metrics-*"))
    tensors = load_file(files[1])
    assert len(files) == 2 and len(tensors) == 7
    sizes = [
        dry_run(
            tiny.model("llama"), tmp_path / "text.txt", tmp_path / "no", recipe=LEARNING.model_copy(update=each)
        ).work
        for each in ({}, {"rounding": "nearest"})
    ]
    assert sizes[0] - sizes[1] == 2 * sum(value.nbytes for value in tensors.values())
    kept = files[1].read_bytes()
    files[1].write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(MorphoQuantError, match=r"metrics-00001\.safetensors: cannot be used \(its content has changed"):
        learned(tiny, tmp_path, "out")
    files[1].write_bytes(kept)
    monkeypatch.setattr("calibration.precision.measure", _not_again)
    learned(tiny, tmp_path, "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob("*.work"))


def test_metrics_of_outputs_change_the_rounding(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large layers; all outputs of a small one are rounded at once."""
    monkeypatch.setattr("calibration.quantize.output_metric.LEAST_RUN", 8)
    blocks = []
    for name in ("jointly", "apart"):
        with pytest.raises(Stopped):
            learned(tiny, tmp_path, name, on_block=stop)
        blocks.append(load_file(tmp_path / f"{name}.work" / "block-00000.safetensors"))
        monkeypatch.setattr("calibration.learn.metrics.with_metric", lambda layers: {})
    jointly, apart = blocks
    changed = {name for name, value in jointly.items() if not torch.equal(value, apart[name])}
    assert any(name.endswith("q_proj.weight_codes") for name in changed)


@pytest.mark.parametrize(
    ("settings", "budget"),
    [({}, "model"), ({"effort": "fast"}, None), pytest.param({"budget": "equal"}, None, marks=pytest.mark.full)],
)
def test_escapes_are_shared_where_the_model_learns(
    tiny: TinyModels, tmp_path: Path, settings: dict[str, Any], budget: str | None
) -> None:
    recipe = LEARNING.model_copy(update=settings)
    report = learned(tiny, tmp_path, "out", recipe)
    assert report["settings"].get("budget") == budget and ("escape_budgets" in report) == (budget == "model")
    assert ("learning" in report) == (recipe.effort != "fast")


def test_derivatives_that_compare_nothing_leave_equal_budgets_and_a_line_says_so(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = EscapeCosts(torch.full((2, 8), float("nan")), torch.zeros(2, 8))
    monkeypatch.setattr("calibration.precision.escape_costs", lambda probe: nothing)
    report = run(tiny, tmp_path / "out", Recipe(device="cpu", sample_tokens=64, max_samples=2, budget="model"))
    assert "the derivatives compare nothing, so every input has the same budget" in caplog.text
    assert not {"escape_budgets"} & report.keys() and "budget" not in report["settings"]


@pytest.mark.parametrize("budget", [4.0, 8.5])
def test_an_impossible_budget_costs_nothing(tiny: TinyModels, tmp_path: Path, budget: float) -> None:
    recipe = BUDGET.model_copy(update={"bits_budget": budget})
    for call in (calibrate, dry_run):
        with pytest.raises(MorphoQuantError, match=rf"^bits_budget = {budget:g}: must be 4\.\d+ to 8, "):
            call(tiny.model("llama"), tiny.data("llama"), tmp_path / "out", recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_a_budget_counts_in_the_forecast(tiny: TinyModels, tmp_path: Path) -> None:
    plain, wide = (
        dry_run(
            tiny.model("llama"), tiny.data("llama"), tmp_path / "o", recipe=BUDGET.model_copy(update={"bits_budget": b})
        )
        for b in (None, 7.9)
    )
    assert wide.checkpoint > plain.checkpoint and wide.work - plain.work == wide.checkpoint - plain.checkpoint


def test_every_form_is_exported_and_reloaded(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    report = calibrate_mixed(tiny.model("llama"), tiny.data("llama"), output, monkeypatch, PREFIX)
    spec = verify_checkpoint(output)
    kept = f"{PREFIX}.1.self_attn.o_proj"
    assert report["bits"]["sixteen_bit"] == [kept] and kept not in spec.layers
    assert f"{kept}.weight" in check_headers(output, spec)
    wide = {layer.shared_input for layer in spec.layers.values() if layer.weight_bits == 8}
    assert wide == {f"{PREFIX}.{name}" for name, form in FORMS.items() if form == 8}
    errors = {name: layer["output_error"] for name, layer in report["layers"].items()}
    assert max(errors.values()) < 0.3
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    hf.configure(model, reference=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny.model("llama"), dtype=torch.float32)
    reference = swap_linears(plain, Checkpoint(output))
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
        hf.configure(model, reference=False)
        # The kernels of this machine, in another order of sums.
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-3)
