"""Turns questions into model inputs by the model's processor; each medium is processed once."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.tiny_omni.data.digits import FRAMES_PER_SECOND
from benchmarks.models.tiny_omni.data.questions import Question
from calibration.data.conversations import Media
from calibration.data.media import decode_audio, decode_image, decode_video

_MODALITIES = {"image_url": "image", "audio_url": "audio", "video_url": "video"}


class Encoder:
    """Turns questions into batches for the thinker.

    `processor`: of the model directory. `dtype`: of pixels. `keep`: kinds of media ("image", "audio", "video"); their
    features are kept for the next time that a medium is used. Those of pictures and clips are large.
    """

    def __init__(self, processor: Any, dtype: torch.dtype = torch.float32, keep: Collection[str] = ()) -> None:
        self.processor, self.dtype, self.keep = processor, dtype, keep
        self.tokens = {kind: getattr(processor, f"{kind}_token") for kind in _MODALITIES.values()}
        self._kept: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def features(self, kind: str, file: str) -> tuple[int, dict[str, Tensor]]:
        """How many tokens the medium makes, and the model's keyword arguments for it."""
        if file in self._kept:
            return self._kept[file]
        media = Media(kind, Path(file), file)
        given: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if kind == "image":
            given["images"] = [decode_image(media)]
        elif kind == "audio":
            given["audio"] = [decode_audio(media, self.processor.feature_extractor.sampling_rate)]
        else:
            frames, metadata = decode_video(media, lambda metadata: range(metadata.total_num_frames))
            given["videos"] = [frames]
            options["videos_kwargs"] = {
                "video_metadata": [metadata],
                "do_sample_frames": False,
                "fps": FRAMES_PER_SECOND,
                "input_data_format": "channels_last",
            }
        batch = self.processor(text=[self.tokens[kind]], return_tensors="pt", **given, **options)
        features = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask")}
        for name, value in features.items():
            features[name] = torch.as_tensor(value)
            if name.startswith("pixel"):
                features[name] = value.to(self.dtype)
        if kind == "audio":
            # Padded to the extractor's full length and masked in the model.
            length = int(features["feature_attention_mask"].sum())
            for name in ("input_features", "feature_attention_mask"):
                features[name] = features[name][..., :length].clone()
        encoded = batch["input_ids"].shape[1], features
        if kind in self.keep:
            self._kept[file] = encoded
        return encoded

    def prompt(self, question: Question) -> tuple[str, list[dict[str, Tensor]]]:
        """The rendered prompt with every placeholder token written out, and the features of its media."""
        content, media = [], []
        for part in question.messages[0]["content"]:
            kind = _MODALITIES.get(part["type"])
            content.append(part if kind is None else {"type": kind})
            if kind is not None:
                media.append((kind, *self.features(kind, part[part["type"]]["url"])))
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        counts = iter([count for _, count, _ in media])
        placeholders = "|".join(map(re.escape, self.tokens.values()))
        text = re.sub(placeholders, lambda found: found[0] * next(counts), text)
        return text, [features for _, _, features in media]

    def batch(self, questions: Sequence[Question], with_answers: bool = False) -> dict[str, Tensor]:
        """Keyword arguments of the thinker's forward for questions of any kinds.

        Prompts are padded on the left. With answers, these and the end of the turn follow, padded on the right, and
        `labels` [B, M] hold their token ids and -100 elsewhere.
        """
        tokenizer = self.processor.tokenizer
        prompts, answers, media = [], [], []
        for question in questions:
            text, features = self.prompt(question)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
            ending = question.answer + tokenizer.eos_token
            answers.append(tokenizer(ending, add_special_tokens=False)["input_ids"] if with_answers else [])
            media += features
        before, after = max(map(len, prompts)), max(map(len, answers))
        ids = torch.full((len(prompts), before + after), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            used = slice(before - len(prompt), before + len(answer))
            ids[row, used], mask[row, used] = torch.tensor(prompt + answer), 1
            labels[row, before : before + len(answer)] = torch.tensor(answer, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            **({"labels": labels} if with_answers else {}),
            **_joined(media),
        }


def _joined(media: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the features of all media, in order; audio is padded to the longest, [B, mel bins, frames]."""
    joined: dict[str, list[Tensor]] = {}
    for features in media:
        for name, value in features.items():
            joined.setdefault(name, []).append(value)
    for name in ("input_features", "feature_attention_mask"):
        longest = max((value.shape[-1] for value in joined.get(name, [])), default=0)
        if name in joined:
            joined[name] = [torch.nn.functional.pad(value, (0, longest - value.shape[-1])) for value in joined[name]]
    return {name: torch.cat(values) for name, values in joined.items()}
