import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.architectures import find_architecture
from calibration.collect import run_observed
from calibration.data import load_conversations
from calibration.model import capture_block_inputs, choose_device, load_model
from calibration.recipe import Recipe
from calibration.samples import Sample, build_samples
from calibration.source import open_source
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.schema import DEFAULT_ROWS
from tests.calibration.built_models import TinyModels


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "omni"])
def test_running_block_by_block_is_running_the_model(tiny: TinyModels, name: str) -> None:
    source = open_source(tiny.model(name))
    architecture = find_architecture(source.config)
    samples = build_samples(
        source.directory,
        load_conversations(tiny.data(name)),
        max_tokens=2048,
        max_samples=None,
        placeholder_token_ids=architecture.placeholder_token_ids(source.config),
        rows=DEFAULT_ROWS,
    )
    model = load_model(architecture, source, Recipe(device="cpu"))
    blocks = list(model.get_submodule(architecture.block_module).children())
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any], output: Tensor) -> None:
        seen.append(output)

    handle = blocks[-1].register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for sample in samples:
            model(**sample.inputs, use_cache=False)
        handle.remove()
        positions = [torch.tensor([0])] * len(samples)
        for entry, sample, expected in zip(
            capture_block_inputs(model, blocks, samples, positions), samples, seen, strict=True
        ):
            hidden = entry.hidden
            for block, arguments in zip(blocks, entry.arguments, strict=True):
                hidden = run_observed(block, hidden, arguments, {}, entry.modality, entry.positions)
            assert hidden.shape[:2] == (1, sample.modality.numel())
            assert torch.equal(hidden, expected)
    assert all("forward" not in vars(block) for block in blocks)


def test_token_ids_beyond_the_embedding_name_the_tokenizer(tiny: TinyModels) -> None:
    source = open_source(tiny.model("llama"))
    architecture = find_architecture(source.config)
    model = load_model(architecture, source, Recipe(device="cpu"))
    rows = source.config["vocab_size"]
    sample = Sample({"input_ids": torch.tensor([[1, rows]])}, torch.zeros(2, dtype=torch.int32), "data.jsonl:7")
    blocks = list(model.get_submodule(architecture.block_module).children())
    expected = rf"data.jsonl:7: token id {rows}, but .* has {rows} rows; the tokenizer belongs to another model"
    with pytest.raises(MorphoQuantError, match=expected):
        capture_block_inputs(model, blocks, [sample], [torch.tensor([0])])


def test_weights_that_lack_a_tensor_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    model = tiny.model("llama")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path)
    with pytest.raises(MorphoQuantError, match=r"the weights lack model.layers.1.input_layernorm.weight"):
        load_model(find_architecture(source.config), source, Recipe(device="cpu"))


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
        load_model(find_architecture(source.config), open_source(tmp_path), Recipe(device="cpu"))
    assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", "meta", "cuda:99"):
        with pytest.raises(MorphoQuantError, match=f"device = '{name}'"):
            choose_device(name)
