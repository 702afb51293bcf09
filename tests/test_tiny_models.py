"""The builders of the tiny models: published names, the same bytes for the same seed, loadable by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from tests import tiny_conversations, tiny_experts, tiny_models


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_tiny_omni(tmp_path_factory.mktemp("models") / "omni")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_conversations.write_calibration_data(tmp_path_factory.mktemp("conversations"))


def test_same_seed_gives_same_bytes(omni: Path, tmp_path: Path) -> None:
    again = tiny_models.build_tiny_omni(tmp_path / "again")
    other = tiny_models.build_tiny_omni(tmp_path / "other", seed=1)
    names = sorted(path.name for path in omni.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        assert (omni / name).read_bytes() == (again / name).read_bytes()
    assert (omni / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_omni_has_three_parts_and_loads_whole(omni: Path) -> None:
    config = json.loads((omni / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni"
    assert config["architectures"] == ["Qwen2_5OmniModel"]
    stored = load_file(omni / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"thinker", "talker", "token2wav"}
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(omni, dtype=torch.float32)
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(loaded[name], value.float()), name
    assert set(model.speaker_map) == {"Chelsie", "Ethan"}


def test_omni_thinker_takes_every_modality(omni: Path, conversations: Path) -> None:
    model, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        omni, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["unexpected_keys"]} == {"talker", "token2wav"}

    processor = AutoProcessor.from_pretrained(omni)
    content = [{"type": kind} for kind in ("image", "audio", "video")] + [{"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with av.open(str(conversations.parent / "media" / "square.mp4")) as container:
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert video.shape == (8, 64, 96, 3)
    inputs = processor(
        text=[prompt],
        images=[tiny_conversations.image(1)],
        audio=[tiny_conversations.sound(4)],
        videos=[video],
        return_tensors="pt",
    )
    thinker = model.config
    for token in (thinker.image_token_id, thinker.audio_token_id, thinker.video_token_id):
        assert int((inputs["input_ids"] == token).sum()) > 1  # the placeholder was expanded
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert torch.isfinite(logits).all()
    best = logits.topk(2, dim=-1).values
    # Tests compare greedy tokens only if the margin exceeds 1e-3, which must hold for nearly all.
    assert (best[:, 0] - best[:, 1] > 1e-3).float().mean() > 0.99


def test_qwen2_5_vl_is_stored_under_published_names(tmp_path: Path) -> None:
    directory = tiny_models.build_tiny_qwen2_5_vl(tmp_path / "vl")
    names = load_file(directory / "model.safetensors").keys()
    assert {"visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= names
    assert not any("language_model" in name for name in names)
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(directory).image_token == "<|image_pad|>"


@pytest.mark.parametrize(
    "build", [tiny_models.build_tiny_llama, tiny_models.build_tiny_qwen3, tiny_experts.build_tiny_qwen3_moe]
)
def test_text_models_load_whole(build: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = AutoTokenizer.from_pretrained(directory)("The user asks.", return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.std() > 1.0  # far from flat


@pytest.mark.parametrize(
    ("build", "model_class", "published"),
    [
        (
            tiny_experts.build_tiny_qwen3_vl_moe,
            Qwen3VLMoeForConditionalGeneration,
            "model.language_model.layers.0.mlp.experts.gate_up_proj",
        ),
        (
            tiny_experts.build_tiny_qwen3_omni_moe,
            Qwen3OmniMoeForConditionalGeneration,
            "thinker.model.layers.0.mlp.experts.3.gate_proj.weight",
        ),
    ],
)
def test_mixtures_of_experts_load_whole_from_their_published_names(
    build: Callable[[Path], Path], model_class: Any, published: str, tmp_path: Path
) -> None:
    directory = build(tmp_path / "model")
    assert published in load_file(directory / "model.safetensors")
    _, info = model_class.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(directory).image_token


def test_decoder_inputs_have_outlier_channels(tmp_path: Path) -> None:
    directory = tiny_models.build_tiny_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(directory)("What can you see in this image?", return_tensors="pt")
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, args, out: seen.append(args[0][0]))
    with torch.no_grad():
        model(**inputs)
    largest = seen[0].abs().amax(dim=0)
    assert (largest > 5 * largest.median()).sum() == 3


def test_conversations_name_files_that_exist(conversations: Path) -> None:
    kinds: set[str] = set()
    for line in conversations.read_text().splitlines():
        for message in json.loads(line)["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else []
            for part in parts:
                kinds.add(part["type"])
                value = part[part["type"]]
                if part["type"].endswith("_url") and not value["url"].startswith("data:"):
                    assert (conversations.parent / value["url"]).is_file()
    assert kinds == {"text", "image_url", "input_audio", "audio_url", "video_url"}
