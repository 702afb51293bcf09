"""Image towers quantized on request, end to end on tiny models, and refusals."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import morphoquant_vllm.hf
from calibration.blocks.loop import BlockResult
from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.calibrate import calibrate
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from calibration.model.architectures import find_architecture
from calibration.model.plan import plan
from calibration.model.source import TensorInfo
from calibration.settings.recipe import Recipe, read_recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.calibration.output_errors import OutputErrors
from tests.reference_model import Checkpoint, swap_linears

# Model class; (name in the weight files, name in transformers) of decoder and tower; linears of a tower's block.
MODELS = {
    "omni": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {"thinker.model.": "model.", "thinker.visual.": "visual."},
        ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"model.layers.": "model.language_model.layers.", "visual.": "model.visual."},
        ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    # Its tower's features also reach later blocks of the decoder.
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"model.language_model.layers.": "model.language_model.layers.", "model.visual.": "model.visual."},
        ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    ),
}
BLOCKS = {"qwen3_vl": 3}
# Every token and patch is drawn and counts the same: errors can then be measured from outside.
EVERY_TOKEN = Recipe(device="cpu", sample_tokens=100_000, modality_balance=0.0, towers=("image",))


def module_name(layer: str, prefixes: dict[str, str]) -> str:
    return next(new + layer.removeprefix(old) for old, new in prefixes.items() if layer.startswith(old))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["omni", "qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.full)])
def test_a_tower_serves_what_the_report_says(
    tiny: TinyModels, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model_class, prefixes, linears = MODELS[name]
    source, data, output = tiny.model(name), tiny.data(name), tmp_path / "out"
    with caplog.at_level(logging.INFO, "calibration"):
        report = calibrate(source, data, output, recipe=EVERY_TOKEN)
    assert [message[:22] for message in caplog.messages if "tower" in message] == [
        f"image tower: block {block}/2" for block in (1, 2)
    ]
    assert len(verify_checkpoint(output).layers) == 7 * BLOCKS.get(name, 2) + 2 * len(linears)
    spec = read_spec(output)
    tower = [layer for layer in spec.layers if "visual" in layer]
    stem = {"omni": "thinker.visual.blocks", "qwen3_vl": "model.visual.blocks"}.get(name, "visual.blocks")
    assert tower == [f"{stem}.{block}.{linear}" for block in range(2) for linear in linears]
    for layer, settings in spec.layers.items():
        assert settings.fixed_row == ("image" if layer in tower else "")
    assert report["settings"]["towers"] == ["image"]
    # Pictures and frames are calibrated on together.
    assert {"image", "video"} <= set(report["layers"][tower[0]]["escape_rate"])

    plain, served, reference = (
        getattr(transformers, model_class).from_pretrained(source, dtype=torch.float32).eval() for _ in range(3)
    )
    checkpoint = Checkpoint(output)
    tokens, patches = TokenRows(spec.any_row), TokenRows(spec.rows.index("image"))
    layers = {layer: module_name(layer, prefixes) for layer in spec.layers}
    for layer, module in layers.items():
        bias = served.get_submodule(module).bias
        serving = patches if layer in tower else tokens
        served.set_submodule(module, ServedLinear(checkpoint.layer(layer), bias, serving, torch.device("cpu")))
    stored, module = next(iter(prefixes.items()))
    if name == "omni":
        swap_linears(reference, checkpoint, "thinker.")
    elif name == "qwen3_vl":
        swap_linears(reference, checkpoint)
    else:
        swap_linears(reference, checkpoint, stored, module, tower_prefix="model.")
    samples = build_samples(
        source,
        load_conversations(data),
        max_tokens=2048,
        max_samples=None,
        placeholder_token_ids=spec.placeholder_token_ids,
        rows=spec.rows,
    )
    # The decoder's errors are those behind the quantized tower: both models are run whole.
    measured = OutputErrors(plain, served, layers).run(samples, tokens)
    defined = OutputErrors(plain, reference, layers).run(samples, tokens)
    for layer, entry in report["layers"].items():
        # float32 sums in another order.
        assert entry["output_error"] == pytest.approx(measured[layer], rel=1e-3), layer
        # A code at a tie goes the other way, and all that follows it: a few hundredths.
        assert entry["output_error"] == pytest.approx(defined[layer], abs=0.05), layer
        assert 0 < defined[layer] < 0.5, layer

    reloaded = getattr(transformers, model_class).from_pretrained(output, dtype=torch.float32).eval()
    morphoquant_vllm.hf.configure(reloaded, reference=True)
    for pixels in ("pixel_values", "pixel_values_videos"):
        sample = next(sample for sample in samples if pixels in sample.inputs)
        with torch.no_grad():
            assert torch.equal(reloaded(**sample.inputs).logits, reference(**sample.inputs).logits)


def test_a_run_cut_short_behind_the_tower_goes_on_to_the_same_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = Recipe(device="cpu", rounding="nearest", regression=False, towers=("image",))

    def cut(result: BlockResult) -> None:
        raise KeyboardInterrupt

    calibrate(tiny.model("omni"), tiny.data("omni"), tmp_path / "whole", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny.model("omni"), tiny.data("omni"), tmp_path / "cut", recipe=recipe, on_block=cut)
    kept = tmp_path / "cut.work" / "towers.safetensors"
    written = kept.stat().st_mtime_ns
    went_on: list[tuple[int, int]] = []

    def note(result: BlockResult) -> None:
        went_on.append((result.index, kept.stat().st_mtime_ns))

    calibrate(tiny.model("omni"), tiny.data("omni"), tmp_path / "cut", recipe=recipe, on_block=note)
    assert went_on[0] == (1, written)
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_without_the_setting_towers_keep_their_bytes_and_nothing_tells_of_it(tiny: TinyModels, tmp_path: Path) -> None:
    """An image tower and an audio tower are never quantized by accident."""
    source = tiny.model("omni")
    recipe = Recipe(device="cpu", max_samples=3, rounding="nearest", regression=False)
    report = calibrate(source, tiny.data("omni"), tmp_path / "out", recipe=recipe)
    assert "towers" not in report["settings"]
    assert "fixed_row" not in (tmp_path / "out" / "config.json").read_text()
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out/model-00001-of-00001.safetensors"),
    )
    for tower in ("thinker.visual.", "thinker.audio_tower."):
        names = [tensor for tensor in before if tensor.startswith(tower)]
        assert names == [tensor for tensor in after if tensor.startswith(tower)] and len(names) > 20
        assert all(torch.equal(before[tensor], after[tensor]) for tensor in names)


def test_data_without_pictures_are_refused_before_any_work(tiny: TinyModels, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("Two rivers meet below the old town, where the market is held. " * 8)
    with pytest.raises(MorphoQuantError, match="the calibration data have no image and no video for the image tower"):
        calibrate(tiny.model("omni"), data, tmp_path / "out", recipe=Recipe(device="cpu", towers=("image",)))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("value", ["audio", "smell", 3])
def test_an_unknown_tower_is_one_line(tmp_path: Path, value: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("towers: image\n")
    assert read_recipe(recipe).towers == ("image",)
    recipe.write_text(json.dumps({"towers": [value]}))
    with pytest.raises(MorphoQuantError, match=f"^{recipe}: towers = .* is not allowed: Input should be 'image'"):
        read_recipe(recipe)


CONFIG = {
    "model_type": "qwen2_5_vl",
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "image_token_id": 5,
    "video_token_id": 6,
}


def headers(hidden: int = 1280, intermediate: int = 3420, blocks: int = 2) -> dict[str, TensorInfo]:
    """A Qwen2.5-VL's: a small decoder, and a tower of the published sizes."""
    tower = {
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    decoder = {f"self_attn.{name}_proj": (512, 512) for name in "qkvo"}
    decoder |= {"mlp.gate_proj": (1024, 512), "mlp.up_proj": (1024, 512), "mlp.down_proj": (512, 1024)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in decoder.items()}
    for block in range(blocks):
        shapes |= {f"visual.blocks.{block}.{name}.weight": shape for name, shape in tower.items()}
        shapes |= {f"visual.blocks.{block}.{name}.bias": shape[:1] for name, shape in tower.items()}
    return {name: TensorInfo(Path("f"), "BF16", shape) for name, shape in shapes.items()}


def make_plan(tensors: dict[str, TensorInfo], config: dict[str, Any] = CONFIG, **settings: Any) -> QuantizationSpec:
    return plan(find_architecture(config), config, tensors, Recipe(towers=("image",), **settings))


def test_a_down_proj_that_no_group_divides_stays_in_16_bit() -> None:
    spec = make_plan(headers())
    tower = {name: layer for name, layer in spec.layers.items() if name.startswith("visual.")}
    assert sorted(tower) == sorted(
        f"visual.blocks.{block}.{name}"
        for block in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj")
    )
    fused, proj = tower["visual.blocks.1.attn.qkv"], tower["visual.blocks.0.attn.proj"]
    assert (fused.parallel, fused.shared_input, fused.bias) == ("column", "visual.blocks.1.attn.qkv", True)
    assert (proj.parallel, proj.out_features, proj.fixed_row) == ("row", 1280, "image")
    assert tower["visual.blocks.0.mlp.up_proj"].shared_input == "visual.blocks.0.mlp.gate_up_proj"
    assert spec.tensor_parallel == 8
    # The 32B's.
    assert make_plan(headers(intermediate=3456)).layers["visual.blocks.0.mlp.down_proj"].parallel == "row"


def test_the_towers_groups_limit_the_ranks() -> None:
    assert make_plan(headers(), group_size=128).tensor_parallel == 2, "ten groups of 128 in attn.proj"
    assert make_plan(headers(intermediate=3456)).tensor_parallel == 4, "108 groups of 32 in mlp.down_proj"
    with pytest.raises(MorphoQuantError, match=r"attn\.proj: tensor parallel size 4 breaks a group \(K = 1280"):
        make_plan(headers(), group_size=128, tensor_parallel=4)


def test_ignore_holds_for_towers_and_targets_do_not() -> None:
    spec = make_plan(headers(), targets=("model.layers.*",), ignore=("visual.blocks.0.*", "*.1.attn.proj"))
    assert [name for name in spec.layers if name.startswith("visual.")] == [
        f"visual.blocks.1.{name}" for name in ("attn.qkv", "mlp.gate_proj", "mlp.up_proj")
    ]
    with pytest.raises(MorphoQuantError, match="outside the language model's decoder"):
        make_plan(headers(), targets=("*_proj",))


@pytest.mark.parametrize(
    ("tensors", "settings", "expected"),
    [
        (headers(), {"ignore": ("visual.*",)}, "no linear of the image tower is left"),
        (headers(hidden=90, intermediate=90), {}, "no linear of the image tower is left to quantize: K must be"),
        (
            headers(),
            {"ignore": ("visual.blocks.0.mlp.up_proj",)},
            "visual.blocks.0.mlp.gate_up_proj: its shards share one input",
        ),
        (headers(blocks=0), {}, r"the weights hold no visual\.blocks\.0\.attn\.qkv, so no image tower"),
        (
            {name: info for name, info in headers().items() if "1.attn.proj" not in name},
            {},
            r"visual\.blocks\.1\.attn\.proj\.weight: missing; .*image tower, 2 blocks",
        ),
    ],
)
def test_towers_that_cannot_be_quantized_are_refused(
    tensors: dict[str, TensorInfo], settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(MorphoQuantError, match=expected):
        make_plan(tensors, **settings)


def test_a_model_without_such_a_tower_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match="towers: model_type 'llama' has no image tower that can be quantized"):
        calibrate(tiny.model("llama"), tiny.data("llama"), tmp_path / "out", recipe=EVERY_TOKEN)
    assert not list(tmp_path.iterdir())


def test_newer_names_of_qwen2_5_vls_tower_are_found() -> None:
    tensors = {
        name.replace("visual.", "model.visual.").replace("model.layers", "model.language_model.layers"): info
        for name, info in headers().items()
    }
    assert "model.visual.blocks.1.attn.qkv" in make_plan(tensors).layers
