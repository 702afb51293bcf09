"""Tiny random mixtures of experts in the published layout; see tiny_models."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.models.tiny_omni.config import mrope
from benchmarks.models.tiny_omni.processor import ProcessorSettings, write_processor, write_tokenizer
from tests.tiny_decoders import QWEN3_VISION, qwen3_vl_settings, write_qwen3_vl_processor
from tests.tiny_models import DECODER, write_model

# Down's K keeps whole groups of 32 on two ranks.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def build_tiny_qwen3_moe(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a Qwen3-MoE, expert by expert, into `directory`; return it. `changes` are settings of its config."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    settings = {**DECODER, **EXPERTS, "head_dim": 32, "eos_token_id": ids["im_end"], **changes}
    return write_model(directory, Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings), seed, ids)


def build_tiny_olmoe(directory: Path, seed: int = 0) -> Path:
    """Write an OLMoE, a mixture of experts that calibration does not list, into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    tokens = {"bos_token_id": None, "eos_token_id": ids["im_end"], "pad_token_id": ids["end"]}
    config = transformers.OlmoeConfig(**{**DECODER, **tokens, **sizes})
    return write_model(directory, transformers.OlmoeForCausalLM, config, seed, ids)


def _transposed(name: str, merged: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: merged.transpose(1, 2).contiguous()}


def build_tiny_qwen3_vl_moe(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen3-VL-MoE, whose files hold the experts of a block merged and transposed; return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_qwen3_vl_processor(directory)
    # transformers transposes a tensor only if its shape is not the wanted one, so K may be neither I nor 2I.
    # Published configs have norm_topk_prob, which vLLM reads; transformers always normalizes.
    experts = {**EXPERTS, "moe_intermediate_size": 192, "norm_topk_prob": True}
    config = transformers.Qwen3VLMoeConfig(**qwen3_vl_settings(ids, **experts))
    model_class = transformers.Qwen3VLMoeForConditionalGeneration
    return write_model(directory, model_class, config, seed, ids, published=_transposed)


_AUDIO = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "output_dim": 128,
    "num_mel_bins": 128,
    "downsample_hidden_size": 32,
}


def _talker_config(ids: dict[str, int]) -> dict[str, Any]:
    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "shared_expert_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {**mrope(32), "mrope_interleaved": True},
        **EXPERTS,
        "moe_intermediate_size": 32,
    }
    predictor = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_code_groups": 4,
    }
    codes = ("codec_eos", "codec_nothink", "codec_think_bos", "codec_think_eos", "codec_pad", "codec_bos")
    return {
        "text_config": text,
        "code_predictor_config": predictor,
        "num_code_groups": 4,
        "thinker_hidden_size": DECODER["hidden_size"],
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


def _write_omni_processor(directory: Path) -> dict[str, int]:
    ids = write_processor(directory, "omni", ProcessorSettings(16, 4 * 32 * 32, 64 * 32 * 32))
    sizes = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
    for file, changes in {
        "tokenizer_config.json": {},
        "preprocessor_config.json": {"size": sizes},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": sizes,
        },
    }.items():
        path = directory / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes, "processor_class": "Qwen3OmniMoeProcessor"}))
    return ids


def build_tiny_qwen3_omni_moe(directory: Path, seed: int = 0) -> Path:
    """Write a full Qwen3-Omni-MoE (thinker, talker, code2wav, processor) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = _write_omni_processor(directory)
    visual = qwen3_vl_settings(ids, **EXPERTS, pad_token_id=ids["end"])
    thinker = {
        "text_config": visual["text_config"],
        # Published configs have both, and vLLM reads them: 8 x 8 position embeddings of patches of 16 pixels.
        "vision_config": {**QWEN3_VISION, "image_size": 128, "apply_vit_abs_pos_embed": True},
        "audio_config": _AUDIO,
        "position_id_per_seconds": 13,
        **{f"{kind}_token_id": ids[kind] for kind in ("audio", "image", "video", "user")},
        "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
    }
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker,
        talker_config=_talker_config(ids),
        code2wav_config=_CODE2WAV,
        im_start_token_id=ids["im_start"],
        im_end_token_id=ids["im_end"],
        tts_pad_token_id=ids["first_free"],
        tts_bos_token_id=ids["first_free"] + 1,
        tts_eos_token_id=ids["first_free"] + 2,
        user_token_id=ids["user"],
    )
    return write_model(directory, transformers.Qwen3OmniMoeForConditionalGeneration, config, seed, ids)
