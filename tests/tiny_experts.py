"""Tiny random mixtures of experts in the published layout; see tiny_models."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.models.tiny_omni.experts_config import experts_config, write_experts_processor
from benchmarks.models.tiny_omni.processor import ProcessorSettings, write_tokenizer
from tests.tiny_media_models import QWEN3_VISION, qwen3_vl_settings, write_qwen3_vl_processor
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


def build_tiny_qwen2_moe(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2-MoE, whose blocks have a shared expert beside the routed ones, into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    shared = {"shared_expert_intermediate_size": 128, "norm_topk_prob": True}
    config = transformers.Qwen2MoeConfig(**{**DECODER, **EXPERTS, **shared, "eos_token_id": ids["im_end"]})
    return write_model(directory, transformers.Qwen2MoeForCausalLM, config, seed, ids)


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
    "downsample_hidden_size": 32,
}


def build_tiny_qwen3_omni_moe(directory: Path, seed: int = 0) -> Path:
    """Write a full Qwen3-Omni-MoE (thinker, talker, code2wav, processor) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    pixels = (4 * 32 * 32, 64 * 32 * 32)
    ids = write_experts_processor(directory, ProcessorSettings(16, *pixels), pixels)
    text = qwen3_vl_settings(ids, **EXPERTS, pad_token_id=ids["end"])["text_config"]
    config = experts_config(ids, text, QWEN3_VISION, _AUDIO)
    return write_model(directory, transformers.Qwen3OmniMoeForConditionalGeneration, config, seed, ids)
