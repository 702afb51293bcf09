"""Calibrating mixtures of experts, end to end; results are compared with transformers and the numerics."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from calibration import forecast
from calibration.blocks.time_need import experts_operations
from calibration.calibrate import calibrate, dry_run
from calibration.data.data_files import load_conversations
from calibration.data.rendering import Sample, build_samples
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import ExpertsSpec
from morphoquant_vllm.format.verify import verify_checkpoint
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts, intermediate
from morphoquant_vllm.numerics.linear import matmul
from tests.calibration.built_models import TinyModels
from tests.reference_model import Checkpoint, StepRows, swap_linears
from tests.tiny_experts import build_tiny_olmoe, build_tiny_qwen3_moe

# Model class, and (name in the weight files, name in transformers) of the decoder.
MODELS = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "model.layers", "model.layers"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "", ""),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerForConditionalGeneration", "thinker.model.layers", "model.layers"),
}
MODALITIES = {"qwen3_vl_moe": {"text", "image", "video"}, "qwen3_omni_moe": {"text", "image", "video", "audio"}}
# Every token is drawn and counts the same: errors can then be measured from outside.
# A weak pull, since errors on the fitted tokens themselves are compared.
EVERY_TOKEN = Recipe(device="cpu", sample_tokens=100_000, modality_balance=0.0, shrinkage=4.0)
# Quick, for tests that are about other things than numbers.
QUICK = Recipe(device="cpu", rounding="nearest", regression=False)


class MeasuredExperts(nn.Module):
    """Experts on the torch reference, which note the tokens that chose each and the errors of its inputs.

    `plain` is the 16-bit model's module; its input on the same tokens is put into `aimed`.
    """

    def __init__(self, record: ExpertsRecord, plain: nn.Module, step: StepRows) -> None:
        super().__init__()
        self.record, self.plain, self.step = record, plain, step
        self.aimed: list[Tensor] = []
        plain.register_forward_pre_hook(lambda _, inputs: self.aimed.append(inputs[0]))
        # By input and expert: squared errors and squared outputs.
        self.sums = torch.zeros(2, record.size, 2, dtype=torch.float64)
        self.tokens = torch.zeros(record.size, dtype=torch.int64)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        aimed, rows, record = self.aimed.pop(), self.step.rows, self.record
        gate_up_weights, down_weights = self.plain.gate_up_proj, self.plain.down_proj
        input_rows = token_rows(x, rows, record.input)
        codes = act_quant(x, input_rows, record.input)
        h = intermediate(x, rows, ids, record)
        for e in range(record.size):
            tokens, slots = (ids == e).nonzero(as_tuple=True)
            gate_up, down, activation = record.expert(e)
            found = matmul(codes[tokens], input_rows[tokens], gate_up, record.input.gain, None)
            wanted = aimed[tokens] @ gate_up_weights[e].T
            self._add(0, e, found, wanted)
            gate, up = wanted.chunk(2, dim=1)
            inner = torch.nn.functional.silu(gate) * up
            own_rows = token_rows(h[tokens, slots], rows[tokens], activation)
            own_codes = act_quant(h[tokens, slots], own_rows, activation)
            self._add(1, e, matmul(own_codes, own_rows, down, activation.gain, None), inner @ down_weights[e].T)
            self.tokens[e] += tokens.numel()
        return experts(x, rows, weights.float(), ids, record)

    def _add(self, place: int, expert: int, found: Tensor, wanted: Tensor) -> None:
        wanted = wanted.double()
        self.sums[place, expert] += torch.stack(((found - wanted).square().sum(), wanted.square().sum()))

    def errors(self, place: int) -> list[float]:
        return [float((error / power).sqrt()) for error, power in self.sums[place]]


@torch.no_grad()
def measured(source: Path, output: Path, name: str, samples: list[Sample]) -> Mapping[str, MeasuredExperts]:
    """The experts of a checkpoint after they ran on all samples, with linears and experts on the reference."""
    model_class, stored, module = MODELS[name]
    plain, served = (
        getattr(transformers, model_class).from_pretrained(source, dtype=torch.float32).eval() for _ in range(2)
    )
    checkpoint = Checkpoint(output)
    step = StepRows(checkpoint.spec, by_modality=True)
    served.get_input_embeddings().register_forward_pre_hook(step.see)
    swap_linears(served, checkpoint, stored, module)
    found = {}
    for experts_name in checkpoint.spec.experts:
        place = module + experts_name.removeprefix(stored)
        found[experts_name] = MeasuredExperts(checkpoint.experts(experts_name), plain.get_submodule(place), step)
        served.set_submodule(place, found[experts_name])
    for sample in samples:
        for model in (plain, served):
            model(**sample.inputs, use_cache=False)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        pytest.param("qwen3_vl_moe", marks=pytest.mark.full),
        pytest.param("qwen3_omni_moe", marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_serves_what_its_report_says(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    source, data, output = tiny.model(name), tiny.data(name), tmp_path / "out"
    if name == "qwen3_moe":
        # One block: every phase occurs in it.
        source = build_tiny_qwen3_moe(tmp_path / "model", num_hidden_layers=1)
    report = calibrate(source, data, output, recipe=EVERY_TOKEN)
    spec = verify_checkpoint(output)
    assert set(report["data"]["tokens"]) == MODALITIES.get(name, {"text"})
    assert report["experts"].keys() == spec.experts.keys()
    samples = build_samples(
        source,
        load_conversations(data),
        max_tokens=2048,
        max_samples=None,
        placeholder_token_ids=spec.placeholder_token_ids,
        rows=spec.rows,
    )
    for experts_name, found in measured(source, output, name, samples).items():
        figures = report["experts"][experts_name]
        # A token near the border between two experts may choose the other one.
        assert sum(figures["tokens"]) == int(found.tokens.sum())
        assert max(abs(ours - own) for ours, own in zip(figures["tokens"], found.tokens.tolist(), strict=True)) <= 8
        for place, kind in enumerate(("gate_up", "down")):
            # A code at a tie goes the other way, and all that follows it: a few hundredths. An expert that got
            # another's weights or input would be off by about 1.
            assert figures[f"{kind}_error"] == pytest.approx(found.errors(place), abs=0.05)
            assert max(found.errors(place)) < 0.5
    carried = load_file(next(source.glob("*.safetensors")))
    stored = {key: value for path in output.glob("*.safetensors") for key, value in load_file(path).items()}
    kept = {key for key in carried if "mlp.gate.weight" in key or key.startswith(("talker.", "code2wav."))}
    assert kept and all(torch.equal(stored[key], carried[key]) for key in kept)


def tensors_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def test_experts_stay_in_16_bit_if_ignored(tmp_path: Path, tiny: TinyModels) -> None:
    source = build_tiny_qwen3_moe(tmp_path / "model", num_hidden_layers=1)
    recipe = QUICK.model_copy(update={"ignore": ("*.experts.*",)})
    report = calibrate(source, tiny.data("qwen3_moe"), tmp_path / "out", recipe=recipe)
    spec = verify_checkpoint(tmp_path / "out")
    assert spec.experts == {} and "experts" not in report
    assert len(spec.layers) == 4
    carried, stored = (load_file(next(path.glob("*.safetensors"))) for path in (source, tmp_path / "out"))
    experts = [key for key in carried if ".experts." in key]
    assert experts and all(torch.equal(stored[key], carried[key]) for key in experts)


def test_a_dry_run_estimates_the_time_of_experts(
    tmp_path: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "product_speed", lambda: 1e9)
    model, data, out = tiny.model("qwen3_moe"), tiny.data("qwen3_moe"), tmp_path / "out"
    whole = dry_run(model, data, out, recipe=QUICK)
    linears = dry_run(model, data, out, recipe=QUICK.model_copy(update={"ignore": ("*.experts.*",)}))
    assert whole.seconds is not None and linears.seconds is not None
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    work = experts_operations(ExpertsSpec(4, hidden, 64, 32), 2, sum(whole.tokens.values()), whole.drawn_tokens)
    assert whole.seconds - linears.seconds == pytest.approx(whole.blocks * work / 1e9)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, tiny: TinyModels) -> None:
    source, data = tiny.model("qwen3_moe"), tiny.data("qwen3_moe")

    class Stopped(Exception):
        pass

    def stop(result: Any) -> None:
        raise Stopped

    report = calibrate(source, data, tmp_path / "whole", recipe=QUICK)
    with pytest.raises(Stopped):
        calibrate(source, data, tmp_path / "out", recipe=QUICK, on_block=stop)
    again = calibrate(source, data, tmp_path / "out", recipe=QUICK)
    assert again == report == json.loads((tmp_path / "out" / "morphoquant_calibration.json").read_text())
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "whole")


def test_experts_without_tokens_are_counted_and_warned_of(
    tmp_path: Path, tiny: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    source = build_tiny_qwen3_moe(tmp_path / "model", num_hidden_layers=1, num_experts=16)
    (tmp_path / "text.txt").write_text("The user asks.")
    with caplog.at_level(logging.WARNING):
        report = calibrate(source, tmp_path / "text.txt", tmp_path / "out", recipe=QUICK)
    verify_checkpoint(tmp_path / "out")
    ((_, figures),) = report["experts"].items()
    none = sum(count == 0 for count in figures["tokens"])
    assert figures["none"] == none > 3 and figures["few"] == 16 - none
    assert [error is None for error in figures["down_error"]] == [count == 0 for count in figures["tokens"]]
    (warning,) = (record.message for record in caplog.records if record.name == "calibration.stages")
    assert warning.startswith(f"{none} of 16 experts ({none / 16:.0%}) were chosen by no drawn token")
    assert "--sample-tokens" in warning


# vLLM is asked for the names of an unlisted model, which takes it a minute to start.
@pytest.mark.full
def test_a_mixture_of_an_unknown_kind_is_calibrated_with_its_experts_in_16_bit(
    tmp_path: Path, tiny: TinyModels
) -> None:
    source = build_tiny_olmoe(tmp_path / "model")
    with pytest.raises(MorphoQuantError, match=r"model.layers.0.mlp.experts: .* --ignore '\*.experts.\*'"):
        calibrate(source, tiny.data("llama"), tmp_path / "out", recipe=QUICK)
    recipe = QUICK.model_copy(update={"ignore": ("*.experts.*",)})
    report = calibrate(source, tiny.data("llama"), tmp_path / "out", recipe=recipe)
    assert "generic" in report["architecture"]
    assert sorted(report["layers"]) == [f"model.layers.0.self_attn.{kind}_proj" for kind in "koqv"]
