"""Tiny random models with media beside those of tests/tiny_models.py, in the published layout."""

import json
from pathlib import Path
from typing import Any

import transformers

from benchmarks.models.tiny_omni.config import mrope
from benchmarks.models.tiny_omni.processor import ProcessorSettings, write_processor
from tests.tiny_models import DECODER, write_model

_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}
# Features of both vision blocks are added to the hidden states after the first two decoder blocks.
QWEN3_VISION = {**_VISION, "deepstack_visual_indexes": [0, 1]}


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
        **_qwen3_tokens(ids),
    }


def build_tiny_qwen3_vl(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen3-VL, whose vision features also reach later blocks (deepstack), into `directory`; return it."""
    ids = write_qwen3_vl_processor(directory)
    config = transformers.Qwen3VLConfig(**qwen3_vl_settings(ids))
    return write_model(directory, transformers.Qwen3VLForConditionalGeneration, config, seed, ids)


def build_tiny_qwen3_5(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a Qwen3.5, whose blocks have linear attention but for every third, into `directory`; return it.

    As published, queries have an output gate, a part of each head is rotated, and there are more value heads than keys.
    `changes` are settings of its text config.
    """
    ids = write_qwen3_vl_processor(directory)
    config = transformers.Qwen3_5Config(
        text_config={
            **DECODER,
            "num_hidden_layers": 3,
            "full_attention_interval": 3,
            "head_dim": 64,
            # Half of a head.
            "partial_rotary_factor": 0.5,
            "rope_parameters": {**mrope(32), "mrope_interleaved": True, "partial_rotary_factor": 0.5},
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "bos_token_id": None,
            "eos_token_id": ids["im_end"],
            **changes,
        },
        vision_config=_VISION,
        **_qwen3_tokens(ids),
    )
    return write_model(directory, transformers.Qwen3_5ForConditionalGeneration, config, seed, ids)


def _qwen3_tokens(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
        "tie_word_embeddings": False,
    }


def write_qwen3_vl_processor(directory: Path) -> dict[str, int]:
    """Write the processor of Qwen3-VL and Qwen3.5 into `directory`; its token ids."""
    directory.mkdir(parents=True, exist_ok=True)
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
