"""Calibration data of a stated size: samples with an exact number of tokens, some of them with an image and a sound."""

from __future__ import annotations

import io
import json
import math
import random
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.calibrate.model.tokenizer import CHARACTERS
from morphoquant_vllm.errors import MorphoQuantError

# One token for 28 x 28 pixels, 25 for a second of sound.
PIXELS, IMAGE_TOKENS = 336, (336 // 28) ** 2
AUDIO_SECONDS, AUDIO_TOKENS = 4, 100
AUDIO_RATE = 16000
# Text is words of 7 characters, each a token, and so is the blank before them.
WORD = 8


def text(tokens: int, seed: int) -> str:
    """Text of `tokens` tokens of a generated tokenizer; frequencies of characters are as uneven as those of words."""
    draw = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(CHARACTERS) + 1)]
    characters = draw.choices(CHARACTERS, weights, k=tokens)
    return "".join(" " if place % WORD == 0 else character for place, character in enumerate(characters))


def image_bytes(seed: int) -> bytes:
    """A PNG of coarse coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def sound_bytes(seed: int) -> bytes:
    """A WAV of three tones in noise."""
    draw = random.Random(seed)
    tones = [draw.uniform(100, 2000) for _ in range(3)]
    values = []
    for place in range(AUDIO_SECONDS * AUDIO_RATE):
        level = sum(math.sin(2 * math.pi * tone * place / AUDIO_RATE) for tone in tones) / 4 + draw.gauss(0, 0.02)
        values.append(int(32767 * max(-1.0, min(1.0, level))))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(AUDIO_RATE)
        file.writeframes(struct.pack(f"<{len(values)}h", *values))
    return buffer.getvalue()


def write_data(directory: Path, model: Path, samples: int, tokens: int, media: int, seed: int = 0) -> list[Path]:
    """Write the data for `samples` samples of `tokens` tokens, `media` of them with an image and a sound; its files.

    Calibrate on them with window_tokens = max_tokens = `tokens`. Raises MorphoQuantError if an image and a sound do not
    fit into `tokens`, or if `media` exceeds `samples`.
    """
    if not 0 <= media <= samples:
        raise MorphoQuantError(f"media = {media}: there are {samples} samples; use 0 to {samples}")
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    if media:
        left = tokens - _overhead(model)
        if left < 1:
            raise MorphoQuantError(
                f"tokens = {tokens}: an image, a sound and the chat template alone take {tokens - left}; use more, or "
                "--media 0"
            )
        lines = [_conversation(directory, left, seed + number) for number in range(media)]
        files.append(directory / "conversations.jsonl")
        files[-1].write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    if samples > media:
        files.append(directory / "text.txt")
        files[-1].write_text(text((samples - media) * tokens, seed), encoding="utf-8")
    return files


def _conversation(directory: Path, answer_tokens: int, seed: int) -> dict[str, Any]:
    names = {"image": f"image-{seed}.png", "sound": f"sound-{seed}.wav"}
    (directory / names["image"]).write_bytes(image_bytes(seed))
    (directory / names["sound"]).write_bytes(sound_bytes(seed))
    question = [
        {"type": "image_url", "image_url": {"url": names["image"]}},
        {"type": "audio_url", "audio_url": {"url": names["sound"]}},
    ]
    answer = text(answer_tokens, seed)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _overhead(model: Path) -> int:
    """Tokens of a conversation with an image, a sound, and an empty answer."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "audio"}]},
        {"role": "assistant", "content": ""},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    placeholders = 2
    return len(tokenizer(rendered)["input_ids"]) - placeholders + IMAGE_TOKENS + AUDIO_TOKENS
