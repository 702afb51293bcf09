"""Full configs in the published Qwen3-Omni-MoE layout, its processor's files, and its weights expert by expert."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3OmniMoeConfig

from benchmarks.models.tiny_omni.config import mrope
from benchmarks.models.tiny_omni.processor import ProcessorSettings, write_processor

# As small as transformers lets the part of a Qwen3-Omni-MoE be that makes sounds; nothing here runs it.
_CODE2WAV = {
    "codebook_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_quantizers": 4,
    "upsample_rates": [2, 2],
    "upsampling_ratios": [2],
    "decoder_dim": 32,
}


def interleaved_mrope(head_dim: int) -> dict[str, Any]:
    """The rope parameters of multimodal positions as Qwen3 has them: time, height and width take turns."""
    return {**mrope(head_dim), "mrope_interleaved": True}


def _talker(ids: dict[str, int], hidden: int) -> dict[str, Any]:
    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    text = {
        **small,
        "shared_expert_intermediate_size": 32,
        "rope_parameters": interleaved_mrope(32),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    codes = ("codec_eos", "codec_nothink", "codec_think_bos", "codec_think_eos", "codec_pad", "codec_bos")
    return {
        "text_config": text,
        "code_predictor_config": {**small, "num_code_groups": 4},
        "num_code_groups": 4,
        "thinker_hidden_size": hidden,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
        "audio_token_id": ids["audio"],
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["vision_bos"],
        "audio_start_token_id": ids["audio_bos"],
        "speaker_id": {"ethan": 50},
        **{f"{name}_{'token_id' if name == 'codec_eos' else 'id'}": 56 + row for row, name in enumerate(codes)},
    }


def _for_vllm(vision: dict[str, Any]) -> dict[str, Any]:
    """Keys of the published vision config that vLLM reads and transformers has no use for."""
    side = math.isqrt(vision["num_position_embeddings"])
    return {"image_size": side * vision["patch_size"], "apply_vit_abs_pos_embed": True}


def experts_config(
    ids: dict[str, int], decoder: dict[str, Any], vision: dict[str, Any], audio: dict[str, Any]
) -> Qwen3OmniMoeConfig:
    """Return a full Qwen3-Omni-MoE config with a tiny talker and code2wav; `ids` as `processor.token_ids` gives them.

    `decoder`, `vision` and `audio` are the keys of the thinker's text, vision and audio configs that size them.
    """
    thinker = {
        "text_config": {"bos_token_id": None, "eos_token_id": ids["im_end"], "pad_token_id": ids["end"], **decoder},
        "vision_config": {**vision, **_for_vllm(vision)},
        "audio_config": {"num_mel_bins": 128, **audio},
        "position_id_per_seconds": 13,
        **{f"{kind}_token_id": ids[kind] for kind in ("audio", "image", "video", "user")},
        "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
    }
    return Qwen3OmniMoeConfig(
        thinker_config=thinker,
        talker_config=_talker(ids, decoder["hidden_size"]),
        code2wav_config=_CODE2WAV,
        im_start_token_id=ids["im_start"],
        im_end_token_id=ids["im_end"],
        tts_pad_token_id=ids["first_free"],
        tts_bos_token_id=ids["first_free"] + 1,
        tts_eos_token_id=ids["first_free"] + 2,
        user_token_id=ids["user"],
    )


def write_experts_processor(
    directory: Path, settings: ProcessorSettings, frame_pixels: tuple[int, int], frames_per_second: int | None = None
) -> dict[str, int]:
    """Write the files of Qwen3-Omni-MoE's processor; return `processor.token_ids`.

    `frame_pixels`: the least and the largest number of pixels of a clip's frame. `frames_per_second`: the rate of
    clips; None, as in the published files: none is named.
    """
    ids = write_processor(directory, "omni", settings)
    pictures = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    for file, changes in {
        "tokenizer_config.json": {},
        "preprocessor_config.json": {"size": pictures},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "patch_size": settings.patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": dict(zip(("shortest_edge", "longest_edge"), frame_pixels, strict=True)),
            **({} if frames_per_second is None else {"fps": frames_per_second}),
        },
    }.items():
        path = directory / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes, "processor_class": "Qwen3OmniMoeProcessor"}))
    return ids


def separate_experts(name: str, merged: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the per-expert tensors of `...experts.gate_up_proj` [E, 2I, K] or `...experts.down_proj` [E, K, I]."""
    stem, kind = name.rsplit(".", 1)
    parts = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {kind: 0}
    return {
        f"{stem}.{expert}.{part}.weight": weights.chunk(len(parts))[index].contiguous()
        for expert, weights in enumerate(merged)
        for part, index in parts.items()
    }
