"""Tiny random models in the published layout, for tests: no network, the same bytes for the same seed.

Weights are drawn per tensor from its name, so a tensor does not depend on the ones before it. They are scaled so that
logits are far from flat and three input channels of every decoder linear carry outliers, as in trained models.
"""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.models.tiny_omni.config import mrope, omni_config, stored_dtype, write_config, write_speakers
from benchmarks.models.tiny_omni.experts_config import separate_experts
from benchmarks.models.tiny_omni.processor import VOCAB_SIZE, write_processor, write_tokenizer

# Every row-parallel linear keeps whole groups of 32 on two ranks: K/2 is 64 (o_proj) and 128 (down_proj).
# head_dim is 32, the smallest that vLLM's CPU attention takes.
DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
AUDIO = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "output_dim": 128,
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 128,
}


def _random_tensor(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a float32 tensor of the shape of `like`, drawn from `name` and `seed` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    noise = torch.randn(like.shape, generator=generator)
    parent = name.rsplit(".", 2)[-2]
    if name.endswith(".bias"):
        return noise * (0.5 if parent in ("q_proj", "k_proj", "v_proj") else 0.1)
    if name.endswith(".A_log"):
        # The states of linear attention last for tens to thousands of tokens.
        return 1.5 * noise - 6
    if like.ndim < 2:
        weight = 1 + 0.1 * noise
        if parent in ("input_layernorm", "post_attention_layernorm"):
            channels = torch.randperm(like.numel(), generator=generator)[:3]
            weight[channels] *= torch.tensor([10.0, 20.0, 30.0])
        return weight
    if parent in ("embed_tokens", "audio_bos_eos_token"):
        return noise
    # Logits of a standard deviation of about 4; everything else keeps the variance of its input.
    gain = 4.0 if parent == "lm_head" else 1.0
    inputs = like.shape[-1] if parent == "experts" else like[0].numel()
    return noise * gain / math.sqrt(inputs)


Published = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


def _write_weights(
    directory: Path, model: PreTrainedModel, seed: int, renames: dict[str, str], published: Published
) -> None:
    """Write model.safetensors: bfloat16, but float32 for tensors published so (token2wav)."""
    parameters = {name for name, _ in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and getattr(model.config, "tie_word_embeddings", False):
            continue
        stored = next((new + name[len(old) :] for old, new in renames.items() if name.startswith(old)), name)
        drawn = _random_tensor(stored, value, seed) if name in parameters else value.float()
        drawn = drawn.to(stored_dtype(stored)).contiguous()
        tensors |= {stored: drawn} if ".mlp.experts." not in stored else published(stored, drawn)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_model(
    directory: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    seed: int,
    ids: dict[str, int],
    renames: dict[str, str] | None = None,
    published: Published = separate_experts,
) -> Path:
    """Write config.json and random weights of a model of transformers into `directory`; return it.

    `published` gives the published tensors of a parameter that holds all experts of a block.
    """
    write_config(directory, config, model_class.__name__, ids)
    # The buffers of a model are kept as its constructor makes them, the parameters are drawn anew.
    with torch.random.fork_rng(), torch.no_grad():
        model = model_class._from_config(config, dtype=torch.float32)
    _write_weights(directory, model, seed, renames or {}, published)
    return directory


def build_tiny_omni(directory: Path, seed: int = 0) -> Path:
    """Write a full Qwen2.5-Omni (thinker, talker, token2wav, speakers, processor) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_processor(directory, "omni")
    write_model(directory, Qwen2_5OmniForConditionalGeneration, omni_config(ids, DECODER, VISION, AUDIO), seed, ids)
    write_speakers(directory, ids)
    return directory


def build_tiny_qwen2_5_vl(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL under its published tensor names (`model.layers.*`, `visual.*`); return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_processor(directory, "vl")
    config = Qwen2_5_VLConfig(
        text_config={**DECODER, "rope_parameters": mrope(32), "bos_token_id": None, "eos_token_id": ids["im_end"]},
        vision_config={**VISION, "in_channels": 3},
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_bos"],
        vision_end_token_id=ids["vision_eos"],
        tie_word_embeddings=False,
    )
    published = {"model.visual.": "visual.", "model.language_model.": "model."}
    return write_model(directory, Qwen2_5_VLForConditionalGeneration, config, seed, ids, published)


def build_tiny_llama(directory: Path, seed: int = 0) -> Path:
    """Write a Llama with tied embeddings and no biases into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    config = LlamaConfig(
        **{**DECODER, "tie_word_embeddings": True, "eos_token_id": ids["im_end"], "bos_token_id": None}
    )
    return write_model(directory, LlamaForCausalLM, config, seed, ids)


def build_tiny_qwen2(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2 (biases of q, k and v) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    config = Qwen2Config(**{**DECODER, "eos_token_id": ids["im_end"], "bos_token_id": None})
    return write_model(directory, Qwen2ForCausalLM, config, seed, ids)


def build_tiny_qwen3(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen3 (q and k norms, no biases) into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    config = Qwen3Config(**{**DECODER, "head_dim": 32, "eos_token_id": ids["im_end"]})
    return write_model(directory, Qwen3ForCausalLM, config, seed, ids)


def build_tiny_reward_model(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2 whose head gives a text one score into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    tokens = {"eos_token_id": ids["im_end"], "bos_token_id": None, "pad_token_id": ids["end"]}
    return write_model(
        directory, Qwen2ForSequenceClassification, Qwen2Config(**{**DECODER, **tokens, "num_labels": 1}), seed, ids
    )
