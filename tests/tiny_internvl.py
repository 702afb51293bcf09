"""A tiny InternVL in transformers' layout, and one whose decoder is quantized at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from benchmarks.models.tiny_omni.processor import chat_template, write_tokenizer
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE
from morphoquant_vllm.format.files import read_json
from morphoquant_vllm.format.layers import LayerSpec, stored_name
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.seal import sealed
from tests.checkpoints import random_group
from tests.tiny_models import DECODER, write_model

# One tile of 28 x 28 pixels is 16 patches, and these are 4 tokens.
_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": [28, 28],
    "patch_size": [7, 7],
}
TILE_TOKENS = 4
# InternVL's names of its tokens; the ids here are those of the tiny Qwen2.5-VL.
IMAGE = "<|image_pad|>"
_TOKENS = {
    "start_image_token": "<|vision_start|>",
    "end_image_token": "<|vision_end|>",
    "context_image_token": IMAGE,
    "video_token": "<|video_pad|>",
}
_SHARED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


# Qwen2's class in vLLM passes its embedding a quantization config, Cohere's does not.
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "cohere": {"architectures": ["CohereForCausalLM"], "rms_norm_eps": None, "logit_scale": 0.5},
}


def write_internvl(directory: Path, decoder: str = "qwen2") -> Path:
    """Write a checkpoint whose token table names the image's token, as its config does; return `directory`.

    `decoder` is a key of DECODERS.
    """
    build_tiny_internvl(directory, decoder)
    _quantize(directory, {"image": (read_json(directory / CONFIG_FILE)["image_token_id"],)})
    return directory


def build_tiny_internvl(directory: Path, decoder: str = "qwen2") -> Path:
    """Write an InternVL whose decoder is of a type of DECODERS into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "vl")
    _write_processor(directory)
    config = InternVLConfig(
        text_config={
            "model_type": decoder,
            **DECODER,
            "eos_token_id": ids["im_end"],
            "bos_token_id": None,
            "pad_token_id": ids["end"],
            **DECODERS[decoder],
        },
        vision_config=_VISION,
        image_token_id=ids["image"],
        image_seq_length=TILE_TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return write_model(directory, InternVLForConditionalGeneration, config, 0, ids)


def with_placeholder(template: str, token: str) -> str:
    """The chat template of Qwen's models that writes `token` alone for a picture; the processor adds what is around."""
    return template.replace(f"<|vision_start|>{IMAGE}<|vision_end|>", token)


def _write_processor(directory: Path) -> None:
    tokenizer = read_json(directory / "tokenizer_config.json")
    named = {"processor_class": "InternVLProcessor"}
    media = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 2}
    for file, content in {
        "tokenizer_config.json": {**tokenizer, "extra_special_tokens": _TOKENS},
        "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessor", **media, **tiles},
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **media},
        "processor_config.json": {"image_seq_length": TILE_TOKENS},
        "chat_template.json": {"chat_template": with_placeholder(chat_template("vl"), IMAGE)},
    }.items():
        (directory / file).write_text(json.dumps(content | named))


def _quantize(directory: Path, placeholders: dict[str, tuple[int, ...]]) -> None:
    file = directory / "model.safetensors"
    source = load_file(file)
    layers: dict[str, LayerSpec] = {}
    for block in range(DECODER["num_hidden_layers"]):
        stem = f"model.language_model.layers.{block}"
        for fused, shards in _SHARED.items():
            for shard in shards:
                out_features, in_features = source[f"{stem}.{shard}.weight"].shape
                layers[f"{stem}.{shard}"] = LayerSpec(
                    in_features=in_features,
                    out_features=out_features,
                    group_size=32,
                    parallel="column" if len(shards) > 1 else "row",
                    shared_input=f"{stem}.{fused}",
                    bias=f"{stem}.{shard}.bias" in source,
                )
    spec = QuantizationSpec(layers=layers, placeholder_token_ids=placeholders, created_by="tests")
    changes: dict[str, Tensor | None] = {}
    for number, names in enumerate(spec.shared_inputs().values()):
        matrices = [source[f"{name}.weight"].float() for name in names]
        groups = random_group(matrices, layers[names[0]], spec, torch.tensor(number))
        for name, tensors in zip(names, groups, strict=True):
            changes[f"{name}.weight"] = None
            changes |= {stored_name(name, tensor): value for tensor, value in tensors.items()}
    tensors = {name: tensor for name, tensor in (source | changes).items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    config = read_json(directory / CONFIG_FILE)
    written = {**config, "quantization_config": sealed(directory, config, spec).to_dict()}
    (directory / CONFIG_FILE).write_text(json.dumps(written))
