"""Tiny random models with media beside those of tests/tiny_models.py, in the published layout."""

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from benchmarks.models.tiny_omni.config import mrope
from benchmarks.models.tiny_omni.processor import ProcessorSettings, chat_template, write_processor, write_tokenizer
from tests.tiny_internvl import with_placeholder
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
        text_config=_qwen3_5_text(ids, **changes), vision_config=_VISION, **_qwen3_tokens(ids)
    )
    return write_model(directory, transformers.Qwen3_5ForConditionalGeneration, config, seed, ids)


def build_tiny_qwen3_5_text(directory: Path, seed: int = 0) -> Path:
    """Write the language model of such a Qwen3.5 alone (`qwen3_5_text`) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    config = transformers.Qwen3_5TextConfig(**_qwen3_5_text(ids))
    return write_model(directory, transformers.Qwen3_5ForCausalLM, config, seed, ids)


def _qwen3_5_text(ids: dict[str, int], **changes: Any) -> dict[str, Any]:
    return {
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
    }


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
    video = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": sizes,
    }
    files = {"preprocessor_config.json": {"size": sizes}, "video_preprocessor_config.json": video}
    _write_json(directory, {"tokenizer_config.json": {}, **files}, "Qwen3VLProcessor")
    return ids


# Names in the files that Gemma 3 and Qwen2-Audio were published with.
_PUBLISHED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.audio_tower.": "audio_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# Tokens of a picture of Gemma 3: one of four patches in a row.
GEMMA_TOKENS = 4


def build_tiny_gemma3(directory: Path, seed: int = 0) -> Path:
    """Write a Gemma 3 that takes pictures, under its published tensor names, into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "vl")
    # vLLM joins the line ends around a picture to these.
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
    _write_json(
        directory,
        {
            "tokenizer_config.json": {"extra_special_tokens": tokens},
            "preprocessor_config.json": {
                "image_processor_type": "Gemma3ImageProcessor",
                "size": {"height": 56, "width": 56},
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            },
            "processor_config.json": {"image_seq_length": GEMMA_TOKENS},
            "chat_template.json": {"chat_template": with_placeholder(chat_template("vl"), "<|vision_start|>")},
        },
        "Gemma3Processor",
    )
    config = transformers.Gemma3Config(
        text_config={
            **DECODER,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 64,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=GEMMA_TOKENS,
        boi_token_index=ids["vision_bos"],
        eoi_token_index=ids["vision_eos"],
        image_token_index=ids["image"],
        bos_token_id=None,
        eos_token_id=ids["im_end"],
        pad_token_id=ids["end"],
    )
    return write_model(directory, transformers.Gemma3ForConditionalGeneration, config, seed, ids, _PUBLISHED)


def build_tiny_mistral3(directory: Path, seed: int = 0) -> Path:
    """Write a Mistral 3 that takes pictures (Mistral Small, Ministral 3) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "vl")
    tokens = {"image_token": "<|image_pad|>", "image_break_token": "<|quad_start|>", "image_end_token": "<|quad_end|>"}
    sizes = {"patch_size": 14, "spatial_merge_size": 2}
    _write_json(
        directory,
        {
            "tokenizer_config.json": {},
            "preprocessor_config.json": {
                "image_processor_type": "PixtralImageProcessor",
                "patch_size": {"height": 14, "width": 14},
                "size": {"longest_edge": 112},
                # As published; vLLM reads them in this file, and knows no defaults of the class.
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            },
            "processor_config.json": {**sizes, **tokens},
            "chat_template.json": {"chat_template": chat_template("vl")},
        },
        "PixtralProcessor",
    )
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral",
            **DECODER,
            "head_dim": 32,
            "sliding_window": None,
            "bos_token_id": None,
            "eos_token_id": ids["im_end"],
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "image_size": 112,
            "patch_size": 14,
        },
        spatial_merge_size=2,
        image_token_index=ids["image"],
        tie_word_embeddings=False,
    )
    published = {old: new.removesuffix("vision_model.") for old, new in _PUBLISHED.items()}
    return write_model(directory, transformers.Mistral3ForConditionalGeneration, config, seed, ids, published)


def build_tiny_qwen2_audio(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2-Audio, whose tower takes one window of 30 s, under its published names; return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "omni")
    _write_json(
        directory,
        {
            "tokenizer_config.json": {},
            "preprocessor_config.json": {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "feature_size": 128,
                "sampling_rate": 16000,
                "chunk_length": 30,
                "n_samples": 480000,
                "nb_max_frames": 3000,
                "hop_length": 160,
                "n_fft": 400,
                "padding_value": 0.0,
                "return_attention_mask": True,
            },
            "chat_template.json": {"chat_template": chat_template("omni")},
        },
        "Qwen2AudioProcessor",
    )
    config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **DECODER, "bos_token_id": None, "eos_token_id": ids["im_end"]},
        audio_config={
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 128,
        },
        audio_token_index=ids["audio"],
    )
    return write_model(directory, transformers.Qwen2AudioForConditionalGeneration, config, seed, ids, _PUBLISHED)


def _write_json(directory: Path, files: dict[str, dict[str, Any]], processor: str) -> None:
    """Add settings, and the processor's class, to JSON files of `directory`."""
    for file, changes in files.items():
        path = directory / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes, "processor_class": processor}))
