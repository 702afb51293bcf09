"""Generated models: names, shapes, files and ids of the published ones, and refusals."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3MoeForCausalLM,
)

from benchmarks.calibrate.data import text
from benchmarks.calibrate.model import generate as generate_module
from benchmarks.calibrate.model.generate import INV_FREQ, SHARD_SIZE, generate, meta_tensors
from benchmarks.calibrate.model.layouts import PUBLISHED, layout_config, text_config
from benchmarks.calibrate.model.safetensors_file import header, write_safetensors
from benchmarks.calibrate.model.tokenizer import USER_ID
from benchmarks.calibrate.model.weights import MASSIVE, MASSIVE_CHANNELS, draw
from morphoquant_vllm.errors import MorphoQuantError


def test_the_weights_are_those_of_the_model_class(model: Path) -> None:
    config = Qwen2_5OmniConfig.from_pretrained(model)
    with torch.device("meta"):
        expected = Qwen2_5OmniForConditionalGeneration(config).state_dict()
    with safe_open(model / "model.safetensors", "pt") as file:
        written = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
        shapes = {name: tuple(part.get_shape()) for name, part in written.items()}
        dtypes = {name: part.get_dtype() for name, part in written.items()}
    assert shapes.pop(INV_FREQ) == (8,)
    assert shapes == {name: tuple(value.shape) for name, value in expected.items()}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {
        name for name in dtypes if name.startswith("token2wav.")
    }


def test_transformers_loads_every_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    full = Qwen2_5OmniForConditionalGeneration.from_pretrained(model, dtype="auto")
    for name, value in full.named_parameters():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    _, loading = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        model, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]


@pytest.mark.parametrize("layout", ["3B", pytest.param("7B", marks=pytest.mark.full)])
def test_real_layouts_have_the_published_size_and_files(layout: str) -> None:
    tensors = meta_tensors(layout)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    assert split.metadata["total_size"] == PUBLISHED[layout].total_size
    assert len(split.filename_to_tensors) == PUBLISHED[layout].files
    if layout == "3B":
        # The published index has this many characters: every name is as long as there, and they are as many.
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        assert len(json.dumps(index, indent=2) + "\n") == 241_817
        # End of the published second file.
        mlp = "talker.model.layers.18.mlp"
        assert split.tensor_to_filename[f"{mlp}.gate_proj.weight"] == "model-00002-of-00003.safetensors"
        last = "model-00003-of-00003.safetensors"
        assert split.tensor_to_filename[f"{mlp}.up_proj.weight"] == last
        # The size of the published third file, its header included.
        wanted = {name: tensors[name] for name in split.filename_to_tensors[last]}
        assert 8 + len(header(wanted)[0]) + sum(tensor.nbytes for tensor in wanted.values()) == 1_978_024_880


def test_a_generated_mixture_of_experts_is_what_transformers_makes_of_its_config(tmp_path: Path) -> None:
    tensors = meta_tensors("30B-A3B", 1)
    expert = [tuple(tensors[f"model.layers.0.mlp.experts.127.{part}_proj.weight"].shape) for part in ("up", "down")]
    assert expert == [(768, 2048), (2048, 768)]
    assert layout_config("30B-A3B")["num_hidden_layers"] == 48
    assert len(split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE).filename_to_tensors) == 1
    model = generate("tiny-experts", tmp_path / "model")
    loaded, loading = Qwen3MoeForCausalLM.from_pretrained(model, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"] and not loading["unexpected_keys"]
    stored = load_file(model / "model.safetensors")
    merged = loaded.model.layers[1].mlp.experts.gate_up_proj[3]
    parts = [stored[f"model.layers.1.mlp.experts.3.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(merged, torch.cat(parts))
    assert (stored["model.embed_tokens.weight"] == MASSIVE).any()


def test_fewer_blocks_have_the_real_width() -> None:
    config, published = layout_config("3B", 1), layout_config("3B")
    assert text_config(config)["num_hidden_layers"] == 1
    text_config(config)["num_hidden_layers"] = 36
    assert config == published
    tensors = meta_tensors("tiny", 1)
    assert {name.split(".")[3] for name in tensors if name.startswith("thinker.model.layers.")} == {"0"}


def test_token_ids_are_the_published_ones(model: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(model).tokenizer
    thinker = layout_config("3B")["thinker_config"]
    for token, key in (("<|AUDIO|>", "audio"), ("<|IMAGE|>", "image"), ("<|VIDEO|>", "video")):
        assert tokenizer.convert_tokens_to_ids(token) == thinker[f"{key}_token_index"]
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 151644
    assert tokenizer("user")["input_ids"] == [USER_ID]
    assert max(tokenizer.get_vocab().values()) < thinker["text_config"]["vocab_size"]
    content = text(96, seed=3)
    ids = tokenizer(content)["input_ids"]
    assert len(ids) == 96 and len(set(ids)) > 30
    assert tokenizer.decode(ids) == content


def test_a_tensor_depends_on_its_name_and_the_seed_alone() -> None:
    name = "thinker.model.layers.0.self_attn.q_proj.weight"

    def drawn(name: str, seed: int) -> Tensor:
        return draw(name, (32, 64), torch.float32, seed, 0)

    assert torch.equal(drawn(name, 0), drawn(name, 0))
    assert not torch.equal(drawn(name, 0), drawn(name, 1))
    assert not torch.equal(drawn(name, 0), drawn(name.replace("q_proj", "o_proj"), 0))


def test_weights_hold_outliers() -> None:
    norm = draw("thinker.model.layers.5.input_layernorm.weight", (256,), torch.float32, 0, 0)
    assert int((norm > 5 * norm.median()).sum()) == 3
    embedding = draw("thinker.model.embed_tokens.weight", (8, 64), torch.bfloat16, 0, 5)
    assert bool((embedding[5, :MASSIVE_CHANNELS] == MASSIVE).all())
    assert float(embedding[4].abs().max()) < MASSIVE / 50
    heavy = []
    for tower in ("visual.merger.mlp.2", "audio_tower.proj"):
        rows = draw(f"thinker.{tower}.weight", (200, 64), torch.float32, 0, 0).norm(dim=1)
        heavy.append(set((rows > 5 * rows.median()).nonzero().flatten().tolist()))
    assert [len(rows) for rows in heavy] == [2, 2]
    assert not heavy[0] & heavy[1]


def test_a_file_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "c": torch.randn(1).bfloat16()}
    write_safetensors(tmp_path / "x.safetensors", tensors, tensors.__getitem__)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(MorphoQuantError, match=r"'4B' is not known; use one of 3B, 7B, tiny, 30B-A3B, tiny-e"):
        layout_config("4B")
    with pytest.raises(MorphoQuantError, match="has 36 decoder blocks; use 1 to 36"):
        layout_config("3B", 37)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**6))
    with pytest.raises(MorphoQuantError, match=r"tiny layout needs 0\.\d GB, but only 0\.0 GB are free"):
        generate("tiny", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Tensor:
        raise OSError("no space left")

    monkeypatch.setattr(generate_module, "draw", fail)
    with pytest.raises(OSError, match="no space left"):
        generate("tiny", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(model: Path) -> None:
    with pytest.raises(MorphoQuantError, match="exists and is not empty"):
        generate("tiny", model)
