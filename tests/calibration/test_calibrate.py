"""End to end on tiny models; results are compared with transformers and the numerics, not with calibration itself."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from calibration.blocks.loop import BlockResult, LayerBegins
from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.calibrate import calibrate
from calibration.data import model_inputs
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.calibration.output_errors import OutputErrors
from tests.reference_model import Checkpoint, swap_linears

# Model class, and (name in the weight files, name in transformers) of the decoder.
MODELS = {
    "llama": ("LlamaForCausalLM", "model.layers", "model.layers"),
    "qwen3": ("Qwen3ForCausalLM", "model.layers", "model.layers"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "model.layers", "model.language_model.layers"),
    "omni": ("Qwen2_5OmniThinkerForConditionalGeneration", "thinker.model.layers", "model.layers"),
}
MODALITIES = {"qwen2_5_vl": {"text", "image", "video"}, "omni": {"text", "image", "video", "audio"}}
# Every token is drawn and counts the same: errors can then be measured from outside.
EVERY_TOKEN = Recipe(device="cpu", sample_tokens=100_000, modality_balance=0.0)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_checkpoint_serves_what_its_report_says(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    model_class, *prefixes = MODELS[name]
    source, data, output = tiny.model(name), tiny.data(name), tmp_path / "out"
    blocks: list[BlockResult] = []
    begun: list[LayerBegins] = []
    report = calibrate(source, data, output, recipe=EVERY_TOKEN, on_block=blocks.append, on_layer=begun.append)
    inputs = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert [(layer.index, layer.count) for layer in begun] == [(0, 2)] * 4 + [(1, 2)] * 4
    assert [layer.layer for layer in begun[4:]] == [f"{prefixes[0]}.1.{name}" for name in inputs]
    assert [(block.index, block.count) for block in blocks] == [(0, 2), (1, 2)]
    assert list(tmp_path.iterdir()) == [output]
    assert json.loads((output / "morphoquant_calibration.json").read_text()) == report
    assert len(verify_checkpoint(output).layers) == 14
    spec = read_spec(output)
    assert all(layer.startswith(prefixes[0]) for layer in spec.layers)
    assert set(report["data"]["tokens"]) == MODALITIES.get(name, {"text"})

    plain, served, reference = (
        getattr(transformers, model_class).from_pretrained(source, dtype=torch.float32).eval() for _ in range(3)
    )
    checkpoint = Checkpoint(output)
    serving = TokenRows(spec.any_row)
    layers = {layer: layer.replace(prefixes[0], prefixes[1], 1) for layer in spec.layers}
    for layer, module in layers.items():
        bias = served.get_submodule(module).bias
        served.set_submodule(module, ServedLinear(checkpoint.layer(layer), bias, serving, torch.device("cpu")))
    swap_linears(reference, checkpoint, *prefixes)
    samples = build_samples(
        source,
        load_conversations(data),
        max_tokens=2048,
        max_samples=None,
        placeholder_token_ids=spec.placeholder_token_ids,
        rows=spec.rows,
    )
    measured = OutputErrors(plain, served, layers).run(samples, serving)
    defined = OutputErrors(plain, reference, layers).run(samples, serving)
    for layer, entry in report["layers"].items():
        # float32 sums in another order.
        assert entry["output_error"] == pytest.approx(measured[layer], rel=1e-3)
        # Here a code at a tie goes the other way, and all that follows it: a few hundredths. A layer that got another
        # layer's weights or statistics would be off by about 1.
        assert entry["output_error"] == pytest.approx(defined[layer], abs=0.05)
        assert defined[layer] < 0.5

    before = load_file(source / "model.safetensors")
    after = load_file(output / "model-00001-of-00001.safetensors")
    quantized = {f"{layer}.weight" for layer in spec.layers}
    assert not quantized & set(after)
    for tensor in set(before) - quantized:
        assert torch.equal(before[tensor], after[tensor]), tensor
        assert before[tensor].dtype == after[tensor].dtype
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (output / file.name).read_bytes() == file.read_bytes()


def test_the_model_card_states_licence_tokens_and_errors(tiny: TinyModels, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny.model("omni"), source)
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: owner/name\n---\n# The source\n")
    report = calibrate(source, tiny.data("omni"), output, recipe=Recipe(device="cpu", sample_tokens=64))
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nbase_model: owner/name\nbase_model_relation: quantized\n")
    assert "The source\n" not in card
    for row, count in report["data"]["tokens"].items():
        assert f"| {row} | {count} |" in card
    assert f"| escape rate | {report['escape_rate']:.2%} |" in card
    verify_checkpoint(output)


def test_the_same_run_writes_the_same_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = Recipe(device="cpu", sample_tokens=64, shard_size=300_000)
    for output in ("a", "b"):
        calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / output, recipe=recipe)
    first, second = (
        sorted(path.relative_to(tmp_path / output) for path in (tmp_path / output).rglob("*") if path.is_file())
        for output in ("a", "b")
    )
    assert len([name for name in first if name.match("model-*.safetensors")]) > 1
    assert first == second
    for name in first:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    verify_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_the_model_may_run_in_16_bit(tiny: TinyModels, tmp_path: Path, dtype: str) -> None:
    reports = [
        calibrate(tiny.model("omni"), tiny.data("omni"), tmp_path / name, recipe=Recipe(device="cpu", dtype=name))
        for name in (dtype, "float32")
    ]
    assert len(verify_checkpoint(tmp_path / dtype).layers) == 14
    errors = [[layer["output_error"] for layer in report["layers"].values()] for report in reports]
    # bfloat16 keeps 8 bits of an activation: codes move by one here and there, errors by a few per cent. So few tokens
    # make single layers differ by up to a quarter, as another number of drawn tokens shows.
    assert errors[0] == pytest.approx(errors[1], rel=0.3)
    assert sum(errors[0]) == pytest.approx(sum(errors[1]), rel=0.15)


def test_text_files_and_ignored_layers(tiny: TinyModels, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Two rivers meet below the old town, where the market is held. " * 40)
    recipe = Recipe(device="cpu", window_tokens=64, max_samples=3, ignore=("model.layers.0.*", "*.down_proj"))
    report = calibrate(tiny.model("llama"), [text, tiny.data("llama")], tmp_path / "out", recipe=recipe)
    assert report["data"]["samples"] == 3
    assert len(report["layers"]) == 6
    assert len(verify_checkpoint(tmp_path / "out").layers) == 6


def test_a_link_in_the_place_of_the_work_directory_leads_to_another_disk(tiny: TinyModels, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out.work").symlink_to(tmp_path / "big")
    for _ in range(2):
        calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / "out", overwrite=True)
        verify_checkpoint(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]


def test_a_work_directory_that_cannot_be_removed_is_left_empty(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(Path, "rmdir", busy)
    calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / "out", work=tmp_path / "mount")
    assert list((tmp_path / "mount").iterdir()) == []


def test_places_are_refused_before_the_data_are_read(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    with pytest.raises(MorphoQuantError, match="the name is too long"):
        calibrate(model, "no-such-data", tmp_path / ("n" * 250))
    with pytest.raises(MorphoQuantError, match="the name is too long"):
        calibrate(model, "no-such-data", tmp_path / "out", work=tmp_path / ("n" * 300))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(MorphoQuantError, match=r"but only 0\.00 GB are free"):
        calibrate(model, "no-such-data", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_chat_template_that_does_not_end_is_one_line(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loop is short enough for jinja's sandbox. `skip_bad` would wait for every conversation."""
    model = Path(shutil.copytree(tiny.model("llama"), tmp_path / "model"))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").write_text(loops)
    line = json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]})
    (tmp_path / "data.jsonl").write_text(f"{line}\n" * 3)
    monkeypatch.setattr(model_inputs, "TEMPLATE_SECONDS", 0.3)
    with pytest.raises(MorphoQuantError, match=r"data.jsonl:1: the model's chat template does not end \(0.3 s were"):
        calibrate(model, tmp_path / "data.jsonl", tmp_path / "out", skip_bad=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model"]


def test_newer_names_of_qwen2_5_vl_are_kept(tiny: TinyModels, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny.model("qwen2_5_vl"), source)
    tensors = load_file(source / "model.safetensors")
    renamed = {
        name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "What can you see?"}]}\n')
    report = calibrate(source, data, tmp_path / "out", recipe=Recipe(device="cpu"))
    assert min(report["layers"]) == "model.language_model.layers.0.mlp.down_proj"
    assert len(verify_checkpoint(tmp_path / "out").layers) == 14


def test_weights_with_nan_or_activations_that_overflow_name_the_layer(tiny: TinyModels, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny.model("llama"), source)
    tensors = load_file(source / "model.safetensors")

    def attempt(output: str, name: str, value: float, expected: str) -> None:
        changed: dict[str, Any] = dict(tensors)
        changed[name] = tensors[name].clone()
        changed[name].flatten()[0] = value
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MorphoQuantError, match=expected):
            calibrate(source, tiny.data("llama"), tmp_path / output, recipe=Recipe(device="cpu"))
        assert not (tmp_path / output).exists()

    norm = "model.layers.1.post_attention_layernorm.weight"
    attempt("a", norm, 3e38, r"model.layers.1.mlp.gate_proj: its input holds NaN or infinite")
    attempt("b", "model.layers.1.mlp.down_proj.weight", float("nan"), r"layers.1.mlp.down_proj.weight holds NaN")
    # No block reads the carried tensors here.
    attempt("c", "model.norm.weight", float("inf"), r"model.safetensors: model.norm.weight holds infinity; download")
    assert sorted(path.name for path in tmp_path.glob("*.work")) == ["a.work"], "b and c ended before any work"


def test_layers_of_mtp_are_carried_as_they_are(tiny: TinyModels, tmp_path: Path) -> None:
    """transformers' model does not have them: they draft tokens in vLLM."""
    source = Path(shutil.copytree(tiny.model("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    drawn = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    added = {"mtp.layers.0.mlp.down_proj.weight": drawn, "model.mtp_layers.0.input_proj.weight": drawn + 1}
    save_file({**tensors, **added}, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(source, tiny.data("llama"), tmp_path / "out", recipe=recipe)
    written: dict[str, Any] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert all(torch.equal(written[name], tensor) for name, tensor in added.items())


def test_a_gpu_that_is_too_small_is_one_line(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("calibration.stages.load_front", fill)
    with pytest.raises(MorphoQuantError, match=r"llama: the GPU has too little free memory .*--dtype bfloat16 or"):
        calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / "out", recipe=Recipe(device="cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_talker_with_token_ids_of_its_own_does_not_matter(tiny: TinyModels, tmp_path: Path) -> None:
    """As Qwen3-Omni's: only the thinker is served."""
    source = Path(shutil.copytree(tiny.model("omni"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    served = {row: config["thinker_config"][f"{row}_token_index"] for row in ("image", "video", "audio")}
    for row, token in served.items():
        # One id belongs to another medium in the thinker, the other is not a placeholder.
        config["talker_config"][f"{row}_token_index"] = {"image": served["audio"], "video": 5}.get(row, token + 1)
    (source / "config.json").write_text(json.dumps(config))
    recipe = Recipe(device="cpu", max_samples=8, rounding="nearest", regression=False)
    calibrate(source, tiny.data("omni"), tmp_path / "out", recipe=recipe)
    spec = verify_checkpoint(tmp_path / "out")
    assert spec.placeholder_token_ids == {row: (token,) for row, token in served.items()}
