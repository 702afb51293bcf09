"""Checkpoints loaded by transformers' own `from_pretrained`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import morphoquant_vllm.hf as hf
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.token_table import rows_of_ids
from morphoquant_vllm.format.verify import verify_checkpoint
from morphoquant_vllm.hf.linear import Mode, MorphoQuantLinear
from morphoquant_vllm.numerics.linear import linear
from tests.calibration.built_models import TinyModels
from tests.checkpoints import edit, edit_tensors, file_of, flip_bit, random_group, seal_again
from tests.engine.conftest import REPOSITORY
from tests.quantized_tower import write_quantized_tower
from tests.records import activation_of, weight_of
from tests.reference_model import Checkpoint, reference_thinker, swap_linears
from tests.tiny_conversations import image

# Model class, and (name in the weight files, name in transformers) of the decoder.
MODELS = {
    "llama": ("AutoModelForCausalLM", "", ""),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "model.layers", "model.language_model.layers"),
    "omni": ("Qwen2_5OmniThinkerForConditionalGeneration", "thinker.", ""),
}
IDS = torch.arange(20, 60)[None]
# Two ranks: blocks of K, as many as the tower of a tiny model allows.
QUICK = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False, tensor_parallel=2)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def checkpoints(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        calibrate(tiny.model(name), tiny.data(name), directory / name, recipe=QUICK)
    return {name: directory / name for name in MODELS}


def load(name: str, directory: Path, **arguments: object) -> nn.Module:
    """The model; a quantized one on the torch reference, since these tests compare bits."""
    model = getattr(transformers, MODELS[name][0]).from_pretrained(directory, **arguments)
    if any(isinstance(module, MorphoQuantLinear) for module in model.modules()):
        hf.configure(model, reference=True)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_are_the_reference_models_to_the_last_bit(
    tiny: TinyModels, checkpoints: dict[str, Path], name: str
) -> None:
    load_model = getattr(transformers, MODELS[name][0]).from_pretrained
    model, report = load_model(checkpoints[name], dtype=torch.float32, output_loading_info=True)
    hf.configure(model, reference=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    plain = load(name, tiny.model(name), dtype=torch.float32)
    reference = swap_linears(plain, Checkpoint(checkpoints[name]), *MODELS[name][1:])
    assert torch.equal(logits(model), logits(reference))
    assert sum(isinstance(module, hf.MorphoQuantLinear) for module in model.modules()) == 14
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_full_omni_model_loads_with_its_talker(checkpoints: dict[str, Path]) -> None:
    full = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(checkpoints["omni"], dtype=torch.float32)
    hf.configure(full, reference=True)
    thinker = load("omni", checkpoints["omni"], dtype=torch.float32)
    assert torch.equal(logits(full.thinker), logits(thinker))
    assert full.has_talker


def test_dtype_and_casts_leave_the_formats_tensors_alone(checkpoints: dict[str, Path]) -> None:
    asked = load("llama", checkpoints["llama"], dtype=torch.bfloat16)
    cast = load("llama", checkpoints["llama"], dtype=torch.float32).to(torch.bfloat16)
    for model in (asked, cast):
        layer = model.get_submodule(Q)
        assert layer.activation_step.dtype is layer.absorbed_bias.dtype is torch.float32
        assert layer.weight_codes.dtype is torch.uint8
        assert logits(model).dtype is torch.bfloat16
    for name, buffer in asked.get_submodule(Q).named_buffers():
        assert torch.equal(buffer, cast.get_submodule(Q).get_buffer(name)), "a cast to bfloat16 and back would show"


def test_a_device_map_is_followed(checkpoints: dict[str, Path]) -> None:
    model = load("llama", checkpoints["llama"], dtype=torch.float32, device_map="cpu")
    assert model.get_submodule(Q).weight_codes.device.type == "cpu"
    with pytest.raises(MorphoQuantError, match="needs float64"):
        load("llama", checkpoints["llama"], device_map={"": torch.device("mps")})


def test_exact_mode_is_a_flag_and_can_be_taken_back(checkpoints: dict[str, Path]) -> None:
    model = load("llama", checkpoints["llama"], dtype=torch.float32)
    served = logits(model)
    hf.configure(model, exact=True)
    assert not torch.equal(logits(model), served)
    hf.configure(model, exact=False)
    assert torch.equal(logits(model), served)


def test_each_token_can_take_the_row_of_its_modality(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoints["omni"], tmp_path / "rows"))
    # Calibration writes equal rows; here the image row differs in a way that shows.
    edit(directory, f"thinker.{Q}.absorbed_bias", lambda bias: bias + 5.0 * (torch.arange(6) == 1)[None, :, None])
    model = load("omni", directory, dtype=torch.float32)
    hf.configure(model, row="any")
    (placeholder,) = Checkpoint(directory).spec.placeholder_token_ids["image"]
    seen: list[Tensor] = []
    model.get_submodule(Q).register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    embedded = model.get_input_embeddings()(torch.cat((IDS, torch.full((1, 3), placeholder)), 1)).detach()

    def outputs() -> Tensor:
        with torch.no_grad():
            # Without pixels a placeholder is embedded like any token.
            model.model(inputs_embeds=embedded)
        return seen[-1]

    served = outputs()
    spec = Checkpoint(directory).spec
    rows = rows_of_ids(
        torch.cat((IDS, torch.full((1, 3), placeholder)), 1), spec.placeholder_token_ids, spec.rows
    ).flatten()
    assert rows.tolist() == [0] * 40 + [1] * 3
    model.get_submodule(Q).mode.running.modality = rows
    torch.testing.assert_close(outputs() - served, 5.0 * (rows == 1)[:, None].expand_as(served), rtol=0, atol=1e-4)
    hf.configure(model, row="image")
    torch.testing.assert_close(outputs() - served, torch.full_like(served, 5.0), rtol=0, atol=1e-4)
    hf.configure(model, row="token")
    mode = model.get_submodule(Q).mode
    during: list[list[int] | None] = []
    model.get_submodule(Q).register_forward_pre_hook(
        lambda *_: during.append(None if mode.running.modality is None else mode.running.modality.tolist())
    )
    with torch.no_grad():
        model(IDS)
        # The modality of ready-made embeddings is unknown, also if they go to an inner module.
        model.model(inputs_embeds=embedded[:, :40])
        model(inputs_embeds=embedded)
    assert during == [[0] * 40, None, None]
    hf.configure(model, row="any")
    assert torch.equal(outputs(), served)
    with pytest.raises(MorphoQuantError, match="row 'smell' is unknown"):
        hf.configure(model, row="smell")


def test_a_compiled_model_takes_the_rows_of_its_tokens(checkpoints: dict[str, Path]) -> None:
    """A compiler may take the state of a running pass for constant."""
    model = load("qwen2_5_vl", checkpoints["qwen2_5_vl"], dtype=torch.float32)
    hf.configure(model, reference=False)
    served = logits(model)
    assert torch.equal(logits(torch.compile(model, backend="eager")), served)
    hf.configure(model, row="any")
    assert not torch.equal(logits(model), served)


def test_a_quantized_tower_takes_its_fixed_row(tiny: TinyModels, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    # Its rows are random: another than the fixed one shows.
    write_quantized_tower(checkpoints["omni"], tmp_path / "tower", blocks=2)
    checkpoint = Checkpoint(tmp_path / "tower")
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path / "tower")(
        text=["<|vision_bos|><|IMAGE|><|vision_eos|>What can you see?"], images=[image(5)], return_tensors="pt"
    )

    @torch.no_grad()
    def answer(model: nn.Module) -> Tensor:
        return model(**inputs).logits

    model = load("omni", checkpoint.directory, dtype=torch.float32)
    served = answer(model)
    assert torch.equal(served, answer(reference_thinker(tiny.model("omni"), checkpoint)))
    assert sum(isinstance(module, hf.MorphoQuantLinear) for module in model.visual.modules()) == 12
    model.get_submodule("visual.blocks.0.attn.q").fixed_row = 3
    assert not torch.equal(answer(model), served)


def test_saving_back_is_refused_with_the_reason_and_leaves_nothing(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = load("llama", checkpoints["llama"])
    with pytest.raises(MorphoQuantError, match=r"not saved back, since .*copy the checkpoint directory"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_without_quantized_layers_is_refused(tiny: TinyModels) -> None:
    with pytest.raises(MorphoQuantError, match="LlamaForCausalLM holds no MorphoQuant layer"):
        hf.configure(load("llama", tiny.model("llama")), exact=True)


@pytest.fixture
def damaged(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "damaged"))


def refused(directory: Path, expected: str, name: str = "llama") -> None:
    with pytest.raises(MorphoQuantError, match=expected) as caught:
        load(name, directory)
    assert "\n" not in str(caught.value)


def test_weight_files_that_were_not_checked_are_refused(damaged: Path) -> None:
    """transformers reads a pickle if asked to, and of several files model.safetensors alone."""
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    torch.save(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, damaged / "pytorch_model.bin")
    with pytest.raises(MorphoQuantError, match=r"would read pytorch_model.bin, but .* names model-00001-of-00001"):
        load("llama", damaged, use_safetensors=False)
    norm = tensors.pop("model.norm.weight")
    file.unlink()
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": norm}, damaged / "norm.safetensors", {"format": "pt"})
    placed = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "norm.safetensors"}
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    seal_again(damaged)
    verify_checkpoint(damaged)
    refused(damaged, "would read model.safetensors, but .* names model.safetensors for 2 weight files")


def test_settings_of_another_checkpoint_are_refused(checkpoints: dict[str, Path], damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    rows = config["quantization_config"]["rows"]
    rows[0], rows[-2] = rows[-2], rows[0]
    (damaged / "config.json").write_text(json.dumps(config))
    seal_again(damaged)
    other = transformers.AutoConfig.from_pretrained(damaged)
    with pytest.raises(MorphoQuantError, match="its quantization_config is not the one of the config that is given"):
        load("llama", checkpoints["llama"], config=other)
    assert load("llama", damaged, config=other) is not None


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_served_after_a_pass_and_checked(checkpoints: dict[str, Path], assign: bool) -> None:
    """The kernels' records are made by the first pass."""
    model, other = (
        transformers.AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32) for _ in range(2)
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[f"{Q}.absorbed_bias"] += 5.0
    before = logits(model)
    for loaded in (model, other):
        loaded.load_state_dict(state, assign=assign)
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), before)
    state[f"{Q}.gain"] = state[f"{Q}.gain"] * torch.nan
    with pytest.raises(MorphoQuantError, match=f"{Q}.gain: holds NaN"):
        model.load_state_dict(state, assign=assign)


def test_a_missing_tensor_is_refused(damaged: Path) -> None:
    name = f"{Q}.centre"
    edit_tensors(file_of(damaged, name), {name: None})
    refused(damaged, f"{name} is in model.safetensors.index.json but missing here")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", f"{Q}.centre"])
def test_a_tensor_that_is_missing_from_file_and_index_is_refused(damaged: Path, name: str) -> None:
    """transformers would fill it with random numbers, and warn."""
    config = (damaged / "config.json").read_text()
    edit_tensors(file_of(damaged, name), {name: None})
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    (damaged / "config.json").write_text(config)
    refused(damaged, f"tensor {name} is missing")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_tensor_of_version_2_which_has_no_list_is_refused_too(damaged: Path, name: str) -> None:
    edit_tensors(file_of(damaged, name), {name: None})
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]["integrity"]
    config["quantization_config"]["format_version"] = 2
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, f"tensor {name} of LlamaForCausalLM is missing")


def test_shards_of_one_input_that_differ_are_refused(damaged: Path) -> None:
    edit(damaged, "model.layers.0.self_attn.k_proj.activation_step", lambda step: step * 2)
    refused(damaged, "k_proj.activation_step: differs from that of .*q_proj, but the shards of .* share one input")


def test_a_flipped_bit_is_refused(damaged: Path) -> None:
    flip_bit(damaged, "model.norm.weight")
    refused(damaged, "is damaged .its SHA-256")


def test_a_layer_that_is_not_listed_is_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    settings = config["quantization_config"]
    del settings["layers"]["model.layers.1.mlp.down_proj"], settings["integrity"]
    settings["format_version"] = 2
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, "model.layers.1.mlp.down_proj.* belongs to a quantized layer that quantization_config does not li")


def test_damaged_values_are_refused(damaged: Path) -> None:
    edit(damaged, f"{Q}.gain", lambda gain: gain * torch.nan)
    refused(damaged, f"{Q}.gain: holds NaN")


def test_an_unknown_version_is_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, "format_version 99 is unknown")


def test_a_class_without_the_quantized_layers_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(MorphoQuantError, match="LlamaForCausalLM has no layer thinker"):
        config = transformers.LlamaConfig.from_pretrained(checkpoints["llama"])
        config.quantization_config = json.loads((checkpoints["omni"] / "config.json").read_text())[
            "quantization_config"
        ]
        transformers.LlamaForCausalLM.from_pretrained(checkpoints["omni"], config=config)


IMPORTS = """
import sys
sys.modules["transformers"] = None
try:
    import morphoquant_vllm.hf
except ImportError as error:
    print(error)
del sys.modules["transformers"]
import morphoquant_vllm.hf
"""


def test_it_says_so_where_transformers_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "morphoquant_vllm.hf: the Python package 'transformers' is missing; run pip install '.[hf]' in a checkout of "
        "MorphoQuant, or pip install 'WHEEL[hf]' with the file of its wheel"
    ]


@pytest.mark.parametrize("scheme", ["group", "two_level"])
def test_a_linear_of_either_scale_scheme_is_the_reference(scheme: str) -> None:
    layer = LayerSpec(64, 48, 32, "column", "m", scale_scheme=scheme)
    spec = QuantizationSpec(layers={"m": layer})
    (tensors,) = random_group([torch.randn(48, 64)], layer, spec, torch.tensor(2))
    module = MorphoQuantLinear("m", layer, spec, Mode(spec.any_row))
    module.load_state_dict(tensors)
    module.to(torch.bfloat16).check()
    x = torch.randn(7, 64)
    rows = torch.full((7,), spec.any_row, dtype=torch.int32)
    assert torch.equal(module(x), linear(x, rows, weight_of(tensors), activation_of(tensors)))
