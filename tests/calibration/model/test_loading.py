import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.blocks.capture import capture_block_inputs
from calibration.calibrate import plan_job
from calibration.data.data_files import load_conversations
from calibration.data.rendering import Sample, build_samples
from calibration.model.architectures import Architecture, find_architecture
from calibration.model.block_loader import BlockLoader
from calibration.model.loading import choose_device, load_front
from calibration.model.plan import decoder_names
from calibration.model.source import Source, open_source
from calibration.processes import ONE
from calibration.quantize.observation import run_observed
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from tests.calibration.built_models import TinyModels, with_tensors


def opened(directory: Path, dtype: torch.dtype) -> tuple[Source, Architecture, Recipe]:
    source = open_source(directory)
    return source, find_architecture(source.config), Recipe(device="cpu", dtype=str(dtype).removeprefix("torch."))


def whole_model(source: Source, dtype: torch.dtype) -> Any:
    model_class = getattr(transformers, find_architecture(source.config).model_class)
    return model_class.from_pretrained(source.directory, dtype=dtype).eval()


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "qwen2_5_vl", "omni", "qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_the_one_that_transformers_loads(tiny: TinyModels, name: str, dtype: torch.dtype) -> None:
    source, architecture, recipe = opened(tiny.model(name), dtype)
    whole = whole_model(source, dtype)
    prefix = f"{architecture.block_module}."
    expected = {key: value for key, value in whole.state_dict().items() if not key.startswith(prefix)}
    front = load_front(architecture, source, recipe)
    assert {parameter.device.type for parameter in front.get_submodule(architecture.block_module).parameters()} == {
        "meta"
    }
    found = {key: value for key, value in front.state_dict().items() if not key.startswith(prefix)}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        tied = name == "llama"
        if key == "lm_head.weight" and not tied:
            assert value.device.type == "meta", "nothing needs it"
        else:
            assert value.dtype == expected[key].dtype
            assert torch.equal(value, expected[key]), key
    for key, value in front.named_buffers():
        assert torch.equal(value, whole.get_buffer(key)), key
    names = decoder_names(architecture, source.config, source.tensors)
    loader = BlockLoader(architecture, source, names, recipe)
    assert len(loader) == names.blocks
    for index in range(len(loader)):
        block = loader.load(index)
        assert not block.training
        state = whole.get_submodule(f"{prefix}{index}").state_dict()
        assert block.state_dict().keys() == state.keys()
        for key, value in block.state_dict().items():
            assert value.dtype == state[key].dtype
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "omni"])
@pytest.mark.parametrize("stream_towers", [False, True])
def test_running_block_by_block_is_running_the_model(tiny: TinyModels, name: str, stream_towers: bool) -> None:
    source, architecture, recipe = opened(tiny.model(name), torch.float32)
    samples = build_samples(
        source.directory,
        load_conversations(tiny.data(name)),
        max_tokens=2048,
        max_samples=None,
        placeholder_token_ids=architecture.placeholder_token_ids(source.config),
        rows=DEFAULT_ROWS,
    )
    model = whole_model(source, torch.float32)
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any], output: Tensor) -> None:
        seen.append(output)

    list(model.get_submodule(architecture.block_module).children())[-1].register_forward_hook(keep, with_kwargs=True)
    front = load_front(architecture, source, recipe, stream_towers=stream_towers)
    for tower in architecture.towers:
        held = {parameter.device.type for parameter in front.get_submodule(tower).parameters()}
        assert held == {"meta" if stream_towers else "cpu"}
    skipped = list(front.get_submodule(architecture.block_module).children())
    loader = BlockLoader(architecture, source, decoder_names(architecture, source.config, source.tensors), recipe)
    blocks = [loader.load(index) for index in range(len(loader))]
    positions = [torch.tensor([0])] * len(samples)
    with torch.no_grad():
        for sample in samples:
            model(**sample.inputs, use_cache=False)
        for entry, sample, expected in zip(
            capture_block_inputs(front, skipped, samples, positions), samples, seen, strict=True
        ):
            hidden = entry.hidden
            for block, arguments in zip(blocks, entry.arguments, strict=True):
                hidden = run_observed(block, hidden, arguments, {}, entry.modality, entry.positions)
            assert hidden.shape[:2] == (1, sample.modality.numel())
            assert torch.equal(hidden, expected)
    assert all("forward" not in vars(block) for block in skipped)


def test_token_ids_beyond_the_embedding_name_the_tokenizer(tiny: TinyModels) -> None:
    source = open_source(tiny.model("llama"))
    architecture = find_architecture(source.config)
    model = load_front(architecture, source, Recipe(device="cpu"))
    rows = source.config["vocab_size"]
    sample = Sample({"input_ids": torch.tensor([[1, rows]])}, torch.zeros(2, dtype=torch.int32), "data.jsonl:7")
    blocks = list(model.get_submodule(architecture.block_module).children())
    expected = rf"data.jsonl:7: token id {rows}, but .* has {rows} tokens; the tokenizer belongs to another model"
    with pytest.raises(MorphoQuantError, match=expected):
        list(capture_block_inputs(model, blocks, [sample], [torch.tensor([0])]))


def test_weights_that_lack_a_tensor_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    model = tiny.model("llama")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path)
    architecture, recipe = find_architecture(source.config), Recipe(device="cpu")
    names = decoder_names(architecture, source.config, source.tensors)
    for load in (
        partial(load_front, architecture, source, recipe),
        partial(BlockLoader, architecture, source, names, recipe),
        partial(plan_job, tmp_path, recipe, None, ONE),
    ):
        with pytest.raises(MorphoQuantError, match=r"the weights lack model.layers.1.input_layernorm.weight"):
            load()


def test_a_tied_head_with_other_values_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    model, embedding = tiny.model("llama"), "model.embed_tokens.weight"
    head = load_file(model / "model.safetensors")[embedding].clone()
    same = with_tensors(model, tmp_path, {"lm_head.weight": head})
    load_front(find_architecture(same.config), same, Recipe(device="cpu"))
    head[0, 0] += 1
    other = with_tensors(model, tmp_path, {"lm_head.weight": head})
    with pytest.raises(MorphoQuantError, match=r"lm_head.weight differs from model.embed_tokens.weight, .* to false"):
        load_front(find_architecture(other.config), other, Recipe(device="cpu"))


def test_files_with_the_head_in_place_of_a_tied_embedding_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    # safetensors' save_model keeps the first name of tensors that share memory.
    model = tiny.model("llama")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path)
    with pytest.raises(MorphoQuantError, match=r"hold lm_head.weight alone, but vLLM reads model.embed_tokens.weight"):
        load_front(find_architecture(source.config), source, Recipe(device="cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": 64},
        {"hidden_act": "nonsense"},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "spiral"}},
    ],
)
def test_a_config_that_transformers_refuses_is_one_line(
    tiny: TinyModels, tmp_path: Path, change: dict[str, Any]
) -> None:
    source = open_source(tiny.model("llama"))
    (tmp_path / "model.safetensors").symlink_to(source.directory / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(source.config | change))
    with pytest.raises(MorphoQuantError, match="transformers cannot load it as LlamaForCausalLM") as caught:
        load_front(find_architecture(source.config), open_source(tmp_path), Recipe(device="cpu"))
    assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", "meta", "cuda:99"):
        with pytest.raises(MorphoQuantError, match=f"device = '{name}'"):
            choose_device(name)
