"""Full configs in the published Qwen2.5-Omni layout, and the files that stand beside the weights."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Qwen2_5OmniConfig

# As small as transformers lets the part of a Qwen2.5-Omni be that makes sounds; nothing here runs it.
SMALL_TOKEN2WAV: dict[str, dict[str, Any]] = {
    "dit_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "emb_dim": 16,
        "num_embeds": 65,
        "mel_dim": 16,
        "enc_emb_dim": 16,
        "enc_dim": 16,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_attention_channels": 8,
        "enc_se_channels": 8,
        "look_ahead_layers": [0],
        "look_backward_layers": [0],
    },
    "bigvgan_config": {
        "mel_dim": 16,
        "upsample_initial_channel": 16,
        "upsample_rates": [5, 3],
        "upsample_kernel_sizes": [11, 7],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
    },
}


def mrope(head_dim: int) -> dict[str, Any]:
    """The rope parameters of multimodal positions: time, height and width share head_dim / 2 as they were published."""
    pairs = head_dim // 2
    return {
        "rope_type": "default",
        "mrope_section": [pairs // 4, 3 * pairs // 8, 3 * pairs // 8],
        "rope_theta": 1000000.0,
    }


def omni_config(
    ids: dict[str, int], decoder: dict[str, Any], vision: dict[str, Any], audio: dict[str, Any]
) -> Qwen2_5OmniConfig:
    """Return a full Qwen2.5-Omni config with a tiny talker and token2wav; `ids` as `processor.token_ids` gives them.

    `decoder`, `vision` and `audio` are the keys of the thinker's text, vision and audio configs that size them.
    """
    media = {
        "audio_token_index": ids["audio"],
        "image_token_index": ids["image"],
        "video_token_index": ids["video"],
        "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }
    thinker = {
        **media,
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "user_token_id": ids["user"],
        "vision_token_id": ids["image"],
        "text_config": {"rope_parameters": mrope(32), **decoder, "pad_token_id": ids["end"]},
        "vision_config": {**vision, "in_channels": 3},
        "audio_config": {"num_mel_bins": 128, "n_window": 100, **audio},
    }
    talker = {
        **media,
        "architectures": ["Qwen2_5OmniTalkerForConditionalGeneration"],
        "vocab_size": 64,
        "embedding_size": decoder["hidden_size"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": mrope(32),
        "tts_text_pad_token_id": ids["first_free"],
        "tts_text_start_token_id": ids["first_free"] + 1,
        "tts_text_end_token_id": ids["first_free"] + 2,
        "tts_codec_pad_token_id": 60,
        "tts_codec_start_token_id": 61,
        "tts_codec_end_token_id": 62,
        "tts_codec_mask_token_id": 63,
    }
    return Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config=talker,
        token2wav_config=SMALL_TOKEN2WAV,
        architectures=["Qwen2_5OmniModel"],
    )


def write_speakers(directory: Path, ids: dict[str, int], *, conditioning: int = 16, mel: int = 16) -> None:
    """Write spk_dict.pt of two speakers: transformers refuses the full model without it, the project never opens it.

    `conditioning` and `mel` are the widths of token2wav's speaker embedding and of its spectrograms.
    """
    speakers = {
        name: {
            "bos_token": ids["first_free"] + 3 + row,
            "cond": torch.full((1, conditioning), 0.1 * row),
            "ref_mel": torch.full((1, 30, mel), 0.1 * row),
        }
        for row, name in enumerate(("Chelsie", "Ethan"))
    }
    torch.save(speakers, directory / "spk_dict.pt")


def write_config(directory: Path, config: PreTrainedConfig, architecture: str, ids: dict[str, int]) -> None:
    """Write config.json (bfloat16, `architecture` if it names none) and a greedy generation_config.json."""
    config.architectures = config.architectures or [architecture]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    ends = [ids["im_end"], ids["end"]]
    generation = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[-1]}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def stored_dtype(name: str) -> torch.dtype:
    """The dtype a tensor is published in: bfloat16, but float32 in token2wav."""
    return torch.float32 if name.startswith("token2wav.") else torch.bfloat16
