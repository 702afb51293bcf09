"""Tokenizer and processor files of small models: made on the spot, in the published layout."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 512

# In the order of the published tokenizers, in which they start at id 151643.
_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "{audio}", "{audio_bos}", "{audio_eos}", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "{vision_bos}", "{vision_eos}", "<|vision_pad|>", "{image}", "{video}",
)  # fmt: skip
_OMNI_NAMES = {
    "audio": "<|AUDIO|>", "audio_bos": "<|audio_bos|>", "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>", "vision_eos": "<|vision_eos|>", "image": "<|IMAGE|>", "video": "<|VIDEO|>",
}  # fmt: skip
_VL_NAMES = {
    "audio": "<|object_ref_start|>", "audio_bos": "<|object_ref_end|>", "audio_eos": "<|box_start|>",
    "vision_bos": "<|vision_start|>", "vision_eos": "<|vision_end|>",
    "image": "<|image_pad|>", "video": "<|video_pad|>",
}  # fmt: skip

SENTENCES = (
    "The user asks the assistant a question and the assistant answers the user.",
    "A system message says that you are a helpful assistant.",
    "What can you see in this image? What can you hear in this audio?",
    "The video shows a red square that moves over a blue field.",
    "Describe the picture in one short sentence, and then say what the sound is.",
    "There is a low tone that rises slowly, like a train far away in the night.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "Two rivers meet below the old town, where the market is held every week.",
    "She counted one, two, three, four and five birds on the wire above the street.",
)
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The meaning of the published Qwen2.5 templates: ChatML, a default system turn, one placeholder for each medium.
_TEMPLATE = """
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
{{- 'VISION_BOSIMAGEVISION_EOS' -}}
{%- elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content -%}
{{- 'AUDIO_BOSAUDIOAUDIO_EOS' -}}
{%- elif content['type'] == 'video' or 'video' in content -%}
{{- 'VISION_BOSVIDEOVISION_EOS' -}}
{%- elif 'text' in content -%}
{{- content['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class ProcessorSettings:
    """Sizes of media: patches of `patch_size` pixels, images between two numbers of pixels, audio up to a length.

    The defaults make 4 to 64 tokens of an image and at most 250 of audio. `sentences` train the tokenizer.
    """

    patch_size: int = 14
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 64 * 28 * 28
    audio_seconds: int = 10
    sentences: Sequence[str] = SENTENCES


def _names(kind: str) -> dict[str, str]:
    return _OMNI_NAMES if kind == "omni" else _VL_NAMES


def chat_template(kind: str) -> str:
    """Return the Jinja chat template; kind is "omni", "vl" or "text"."""
    text = _TEMPLATE.strip()
    names = _names(kind)
    for name in ("audio_bos", "audio_eos", "vision_bos", "vision_eos"):
        text = text.replace(name.upper(), names[name])
    for name in ("audio", "image", "video"):
        text = text.replace(name.upper(), names[name])
    return text


def train_tokenizer(kind: str, sentences: Sequence[str] = SENTENCES) -> Tokenizer:
    """Return a byte-level BPE of fewer than VOCAB_SIZE tokens with the special tokens of that kind of model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token.format_map(_names(kind)) for token in _SPECIAL_TOKENS]
    # 16 ids stay free above the special tokens: the talker's text markers are there.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 16 - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # "user" on its own, as in the template, must be one token: the config names its id.
    tokenizer.train_from_iterator([*sentences, *["user", "assistant", "system"] * 8], trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def token_ids(tokenizer: Tokenizer, kind: str) -> dict[str, int]:
    """Return the ids that a model's config names: audio, image, ..., end, im_start, im_end, user, first_free."""
    names = {**_names(kind), "end": "<|endoftext|>", "im_start": "<|im_start|>", "im_end": "<|im_end|>", "user": "user"}
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary[token] for name, token in names.items()}
    ids["first_free"] = len(vocabulary)
    return ids


def write_tokenizer(directory: Path, kind: str, sentences: Sequence[str] = SENTENCES) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json into `directory`; return `token_ids`."""
    tokenizer = train_tokenizer(kind, sentences)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(kind),
    }
    if kind == "omni":
        config["processor_class"] = "Qwen2_5OmniProcessor"
        config["extra_special_tokens"] = {f"{name}_token": token for name, token in _OMNI_NAMES.items()}
    elif kind == "vl":
        config["processor_class"] = "Qwen2_5_VLProcessor"
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return token_ids(tokenizer, kind)


def write_processor(directory: Path, kind: str, settings: ProcessorSettings = ProcessorSettings()) -> dict[str, int]:
    """Write the tokenizer, chat_template.json and preprocessor_config.json; return `token_ids`."""
    ids = write_tokenizer(directory, kind, settings.sentences)
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": settings.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Qwen2_5_VLProcessor",
    }
    if kind == "omni":
        config |= {
            "processor_class": "Qwen2_5OmniProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 128,
            "sampling_rate": 16000,
            "chunk_length": settings.audio_seconds,
            "n_samples": 16000 * settings.audio_seconds,
            "nb_max_frames": 100 * settings.audio_seconds,
            "hop_length": 160,
            "n_fft": 400,
            "dither": 0.0,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
        }
    (directory / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": chat_template(kind)}, indent=2) + "\n")
    return ids
