"""The benchmark's model before training, and how it is written to a directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5OmniForConditionalGeneration

from benchmarks.models.tiny_omni.config import mrope, omni_config, stored_dtype, write_config, write_speakers
from benchmarks.models.tiny_omni.data.questions import all_texts
from benchmarks.models.tiny_omni.processor import SENTENCES, VOCAB_SIZE, ProcessorSettings, write_processor

# Large patches keep sequences short. The processor enlarges every clip to at least 128 * 28 * 28 pixels a frame, here
# 2 x 4 tokens of 2 x 2 patches, and pictures to 2 x 2 tokens. Audio, at most 2 s, makes 25 tokens a second.
PATCH_SIZE = 56
HEAD_DIM = 64
# Text of the chat template for a conversation without a system turn.
SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the decoder and the towers, and the heavy channels.

    `heavy_rows` output channels of the vision merger are `heavy_factor` times as large as at initialisation and do not
    learn. The same number of other channels of the audio projector are, too. So each of them is heavy in one modality.
    """

    hidden: int = 256
    intermediate: int = 512
    layers: int = 3
    heads: int = 4
    tower_hidden: int = 96
    heavy_rows: int = 6
    heavy_factor: float = 35.0


@dataclass(frozen=True)
class Family:
    """How a family of models is made: processor's files, model before training, its heavy rows, and its files.

    `kept`: the media whose features training keeps in memory.
    """

    write_files: Callable[[Path], dict[str, int]]
    initial_model: Callable[[ModelSettings, dict[str, int]], Any]
    heavy_rows: Callable[[Any, ModelSettings], list[tuple[nn.Parameter, Tensor]]]
    write_model: Callable[[Path, Any, dict[str, int]], None]
    kept: tuple[str, ...]


def initial_model(settings: ModelSettings, ids: dict[str, int]) -> Qwen2_5OmniForConditionalGeneration:
    """The full model in float32, drawn from torch's generator; `ids` as `processor.token_ids` gives them."""
    decoder = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads // 2,
        "rope_parameters": mrope(HEAD_DIM),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": settings.tower_hidden,
        "intermediate_size": 2 * settings.tower_hidden,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 2 * PATCH_SIZE,
        "fullatt_block_indexes": [1],
        "out_hidden_size": settings.hidden,
    }
    audio = {
        "d_model": settings.tower_hidden,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * settings.tower_hidden,
        "output_dim": settings.hidden,
    }
    config = omni_config(ids, decoder, vision, audio)
    model = Qwen2_5OmniForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.thinker.named_parameters():
            draw(name, parameter, settings)
        for parameter, rows in heavy_rows(model.thinker, settings):
            parameter[rows] *= settings.heavy_factor
    return model


def draw(name: str, parameter: Tensor, settings: ModelSettings) -> None:
    """Draw a matrix that keeps the variance of its inputs: small models then learn faster than with a spread of 0.02.

    Embeddings and tower outputs start with a spread of about 1, so heavy rows stay heavy.
    """
    if parameter.ndim < 2:
        return
    # Experts of a block are one tensor [E, N, K].
    inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
    spread = inputs**-0.5
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
        spread /= (2 * settings.layers) ** 0.5
    parameter.normal_(std=1.0 if "embed_tokens" in name else spread)


def heavy_channels(settings: ModelSettings) -> tuple[Tensor, Tensor]:
    """The decoder's channels that are heavy in pictures and clips, and those that are in sounds."""
    order = torch.randperm(settings.hidden, generator=torch.Generator().manual_seed(0))
    return order[: settings.heavy_rows], order[settings.heavy_rows : 2 * settings.heavy_rows]


def heavy_rows(thinker: Any, settings: ModelSettings) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights and biases that hold heavy rows, and which rows: those of the two towers are disjoint."""
    vision, audio = heavy_channels(settings)
    merger, projector = thinker.visual.merger.mlp[2], thinker.audio_tower.proj
    return [
        (merger.weight, vision),
        (merger.bias, vision),
        (projector.weight, audio),
        (projector.bias, audio),
    ]


def processor_settings(patch_size: int) -> ProcessorSettings:
    """Settings of a processor that makes 2 x 2 tokens of a picture."""
    pixels = (4 * patch_size) ** 2
    sentences = (*SENTENCES, *([SYSTEM_PROMPT, *all_texts()] * 4))
    return ProcessorSettings(patch_size, pixels, pixels, audio_seconds=2, sentences=sentences)


def write_files(directory: Path) -> dict[str, int]:
    """Write the tokenizer's and the processor's files; return the token ids that the config names."""
    return write_processor(directory, "omni", processor_settings(PATCH_SIZE))


def write_model(directory: Path, model: Qwen2_5OmniForConditionalGeneration, ids: dict[str, int]) -> None:
    """Write config.json, generation_config.json, spk_dict.pt and model.safetensors (bfloat16) beside those files."""
    write_config(directory, model.config, type(model).__name__, ids)
    write_speakers(directory, ids)
    tensors = {name: value.to(stored_dtype(name)).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# In bfloat16 pictures and clips take 4 GiB.
DENSE = Family(write_files, initial_model, heavy_rows, write_model, ("image", "audio", "video"))
