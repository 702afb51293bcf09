"""Tiny random decoders of many architectures, in the published layout: those that calibration lists, and others."""

import json
from pathlib import Path
from typing import Any

import transformers

from benchmarks.models.tiny_omni.config import mrope
from benchmarks.models.tiny_omni.processor import ProcessorSettings, write_processor, write_tokenizer
from tests.tiny_models import DECODER, write_model

# By model_type: transformers' class, and settings of its config that differ from those of DECODER.
# Every token id that a config names must exist, and head_dim is 32, the smallest that vLLM's CPU attention takes.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {"head_dim": 32, "sliding_window": 32}),
    # One block of three has full attention, as published: local and global positions both occur.
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    # q, k and v, and gate and up, are one matrix each.
    "phi3": ("Phi3ForCausalLM", {}),
    # Every fourth block has no rotary positions.
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    "granite": (
        "GraniteForCausalLM",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    # Norms after attention and MLP, and of whole q and k.
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}),
    # LayerNorm with bias, a quarter of each head is rotated, biases of q, k and v.
    "stablelm": ("StableLmForCausalLM", {"use_qkv_bias": True}),
    # No gate, biases everywhere.
    "starcoder2": ("Starcoder2ForCausalLM", {"use_bias": True, "sliding_window": None}),
    # Attention and MLP read the same tensor. vLLM takes RMSNorm if the config names its epsilon.
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.5, "tie_word_embeddings": True, "rms_norm_eps": None}),
    # Norms around attention and MLP, gate and up in one matrix, interleaved positions.
    "glm4": ("Glm4ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "glm": ("GlmForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    # An MLP without a gate, whose activation is the square of relu.
    "nemotron": ("NemotronForCausalLM", {"head_dim": 32}),
    "phi": ("PhiForCausalLM", {}),
    # q, k and v in one matrix beside the MLP's first; blocks return tuples.
    "falcon": (
        "FalconForCausalLM",
        {
            "new_decoder_architecture": False,
            "multi_query": True,
            "num_kv_heads": 1,
            "parallel_attn": True,
            "alibi": False,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 32}),
}


def build_tiny_decoder(model_type: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model of `model_type` in DECODERS into `directory`; return it. `changes` are settings of its config."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    name, settings = DECODERS[model_type]
    model_class = getattr(transformers, name)
    tokens = {"bos_token_id": None, "eos_token_id": ids["im_end"], "pad_token_id": ids["end"]}
    config = model_class.config_class(**{**DECODER, **tokens, **settings, **changes})
    return write_model(directory, model_class, config, seed, ids)


# Features of both vision blocks are added to the hidden states after the first two decoder blocks.
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}


def write_qwen3_vl_processor(directory: Path) -> dict[str, int]:
    """Write the processor of a Qwen3-VL; return `token_ids`."""
    ids = write_processor(directory, "vl", ProcessorSettings(16, 4 * 32 * 32, 64 * 32 * 32))
    sizes = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
    for file, changes in {
        "tokenizer_config.json": {},
        "preprocessor_config.json": {"size": sizes},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": sizes,
        },
    }.items():
        path = directory / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes, "processor_class": "Qwen3VLProcessor"}))
    return ids


def qwen3_vl_settings(ids: dict[str, int], **text: Any) -> dict[str, Any]:
    """The settings of a Qwen3-VL's config; `text` are further ones of its text_config."""
    return {
        "text_config": {
            **DECODER,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "rope_parameters": {**mrope(32), "mrope_interleaved": True},
            "bos_token_id": None,
            "eos_token_id": ids["im_end"],
            **text,
        },
        "vision_config": QWEN3_VISION,
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
        "tie_word_embeddings": False,
    }


def build_tiny_qwen3_vl(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen3-VL, whose vision features also reach later blocks (deepstack), into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_qwen3_vl_processor(directory)
    config = transformers.Qwen3VLConfig(**qwen3_vl_settings(ids))
    return write_model(directory, transformers.Qwen3VLForConditionalGeneration, config, seed, ids)
