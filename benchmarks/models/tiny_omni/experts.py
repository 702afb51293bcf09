"""The benchmark's mixture of experts before training, and how it is written: a Qwen3-Omni-MoE, thinker trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3OmniMoeForConditionalGeneration

from benchmarks.models.tiny_omni.config import stored_dtype, write_config
from benchmarks.models.tiny_omni.data.digits import FRAMES_PER_SECOND
from benchmarks.models.tiny_omni.experts_config import (
    experts_config,
    interleaved_mrope,
    separate_experts,
    write_experts_processor,
)
from benchmarks.models.tiny_omni.model import HEAD_DIM, Family, ModelSettings, draw, heavy_channels, processor_settings
from benchmarks.models.tiny_omni.processor import VOCAB_SIZE

# Its processor enlarges a clip to at least 128 * 32 * 32 pixels a frame, which are 2 x 4 tokens of 2 x 2 patches.
PATCH_SIZE = 64
FRAME_PIXELS = (128 * 32 * 32, 768 * 32 * 32)


@dataclass(frozen=True)
class ExpertsSettings(ModelSettings):
    """As of ModelSettings; `intermediate` is that of an expert, and a token is routed to `routed` of `experts`.

    `balance` is the weight of the loss that keeps the experts equally busy.
    """

    intermediate: int = 256
    experts: int = 8
    routed: int = 2
    balance: float = 0.02


def initial_model(settings: ModelSettings, ids: dict[str, int]) -> Qwen3OmniMoeForConditionalGeneration:
    """The full model in float32, drawn from torch's generator; `settings` are ExpertsSettings."""
    assert isinstance(settings, ExpertsSettings)
    decoder = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "moe_intermediate_size": settings.intermediate,
        "num_experts": settings.experts,
        "num_experts_per_tok": settings.routed,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads // 2,
        "head_dim": HEAD_DIM,
        "rope_parameters": interleaved_mrope(HEAD_DIM),
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
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "out_hidden_size": settings.hidden,
    }
    audio = {
        "d_model": settings.tower_hidden,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * settings.tower_hidden,
        "downsample_hidden_size": 32,
        "output_dim": settings.hidden,
    }
    config = experts_config(ids, decoder, vision, audio)
    model = Qwen3OmniMoeForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.thinker.named_parameters():
            draw(name, parameter, settings)
        for parameter, rows in heavy_rows(model.thinker, settings):
            parameter[rows] *= settings.heavy_factor
        for name, parameter in model.talker.named_parameters():
            # transformers leaves these as the memory was.
            if ".mlp.experts." in name:
                draw(name, parameter, settings)
    return model


def heavy_rows(thinker: Any, settings: ModelSettings) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights and biases that hold heavy rows, and which rows: those of the two towers are disjoint."""
    vision, audio = heavy_channels(settings)
    merger, projector = thinker.visual.merger.mlp[2], thinker.audio_tower.proj2
    return [(merger.weight, vision), (merger.bias, vision), (projector.weight, audio), (projector.bias, audio)]


def write_files(directory: Path) -> dict[str, int]:
    """Write the tokenizer's and the processor's files; return the token ids that the config names."""
    return write_experts_processor(directory, processor_settings(PATCH_SIZE), FRAME_PIXELS, FRAMES_PER_SECOND)


def write_model(directory: Path, model: Any, ids: dict[str, int]) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16, expert by expert)."""
    write_config(directory, model.config, type(model).__name__, ids)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        stored = value.to(stored_dtype(name)).contiguous()
        tensors |= separate_experts(name, stored) if ".mlp.experts." in name else {name: stored}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# Its pictures and clips would take 6 GiB: they are processed at every use.
EXPERTS = Family(write_files, initial_model, heavy_rows, write_model, ("audio",))
