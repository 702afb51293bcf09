"""The configs of published Qwen2.5-Omni models, and a tiny one of the same structure.

The 3B layout: see `published`. The model.safetensors.index.json beside that config states the figures in PUBLISHED.

The 30B-A3B layout: the decoder of Qwen3-Omni-30B-A3B's thinker, as a Qwen3-MoE.

The 7B layout: the defaults of transformers' Qwen2.5-Omni configs are those of its thinker. Its talker is that of
rtp-llm's test of that model: hidden_size 896, 24 layers, 12 and 4 heads. The total size comes from the index of a full
fine-tune (huggingface.co/XD-MU/ScriptAgent), the number of files from the original's listing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from benchmarks.calibrate.model.published import OMNI_3B
from benchmarks.models.tiny_omni.config import SMALL_TOKEN2WAV
from morphoquant_vllm.errors import MorphoQuantError


@dataclass(frozen=True)
class Published:
    """Figures of the published files: bytes of all tensors, and number of weight files."""

    total_size: int
    files: int


PUBLISHED = {"3B": Published(11_972_343_936, 3), "7B": Published(22_362_553_472, 5)}
# Of these the decoder of a mixture of experts alone is generated: text without towers, talker and sound.
DECODERS = ("30B-A3B", "tiny-experts")
LAYOUTS = ("3B", "7B", "tiny", *DECODERS)
# File in a model's directory, and in the checkpoints made of it, that describes the generated model.
GENERATED_FILE = "generated.json"

# Differences from 3B, by the path of the section of config.json.
_Changes = dict[tuple[str, ...], dict[str, Any]]
_CHANGES: dict[str, _Changes] = {
    "3B": {},
    "7B": {
        ("thinker_config", "text_config"): {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "max_window_layers": 28,
        },
        ("thinker_config", "vision_config"): {"out_hidden_size": 3584},
        ("thinker_config", "audio_config"): {"output_dim": 3584},
        ("talker_config",): {
            "embedding_size": 3584,
            "head_dim": 128,
            "intermediate_size": 18944,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        },
    },
    # The vocabulary stays, since the token ids are the published ones. head_dim 32 is the smallest that vLLM's CPU
    # attention takes. K of every linear consists of whole groups of 32 on two ranks.
    "tiny": {
        ("thinker_config", "text_config"): {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        },
        ("thinker_config", "vision_config"): {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
        },
        ("thinker_config", "audio_config"): {
            "d_model": 64,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "output_dim": 128,
        },
        ("talker_config",): {
            "embedding_size": 128,
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        },
        # transformers reads these sizes under its own names; the published ones (dim, depth, heads) equal its defaults.
        **{("token2wav_config", part): sizes for part, sizes in SMALL_TOKEN2WAV.items()},
    },
}


# Keys of a Qwen3-MoE's config.json.
_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
_SMALL_EXPERTS = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def _full_config(layout: str) -> dict[str, Any]:
    if layout in DECODERS:
        return copy.deepcopy(_QWEN3_MOE | (_SMALL_EXPERTS if layout == "tiny-experts" else {}))
    config = copy.deepcopy(OMNI_3B)
    for path, changes in _CHANGES[layout].items():
        part = config
        for key in path:
            part = part[key]
        part.update(copy.deepcopy(changes))
    return config


def layout_config(layout: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a layout as a JSON object; `layers` keeps its width but only this many decoder blocks.

    Raises MorphoQuantError for an unknown layout, or more blocks than it has.
    """
    if layout not in LAYOUTS:
        raise MorphoQuantError(f"layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    config = _full_config(layout)
    text = text_config(config)
    if layers is not None:
        if not 1 <= layers <= text["num_hidden_layers"]:
            raise MorphoQuantError(
                f"layers = {layers}: the {layout} layout has {text['num_hidden_layers']} decoder blocks; "
                f"use 1 to {text['num_hidden_layers']}"
            )
        text["num_hidden_layers"] = layers
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that sizes the decoder: of the thinker, or all of it."""
    part: dict[str, Any] = config["thinker_config"]["text_config"] if "thinker_config" in config else config
    return part
