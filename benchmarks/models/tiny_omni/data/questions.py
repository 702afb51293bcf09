"""Questions over text, pictures, speech, clips and mixtures, whose answers are right by construction."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.models.tiny_omni.data.pool import Pool, media_pool, settings_hash, staged

KINDS = ("text", "image", "audio", "video", "image+text", "image+audio", "video+audio")
SPLIT_KINDS_SEED = {"train": 0, "calibration": 1, "test": 2}
CALIBRATION_PER_KIND = 36
LIST_LENGTH = 3
# Questions about a list of digits. The lists of the splits are disjoint, see `_list_split`.
_LIST_QUESTIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "first": lambda listed: listed[0],
    "second": lambda listed: listed[1],
    "last": lambda listed: listed[-1],
    "largest": max,
    "smallest": min,
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """One user turn in OpenAI's format; media are absolute file paths. `answer` is the exact text of a right answer."""

    kind: str
    messages: list[dict[str, Any]]
    answer: str


def all_texts() -> list[str]:
    """Every text of a question, with one example of each number; the tokenizer is trained on them."""
    texts = [_list_text(which, [3, 1, 4]) for which in _LIST_QUESTIONS]
    return [*texts, *_TEXTS.values(), *(_ADD_TEXT.format(number) for number in range(10))]


_TEXTS = {
    "image": "Digit in the image?",
    "audio": "Spoken digit?",
    "first": "First digit in the video?",
    "last": "Last digit in the video?",
    "image+audio": "Digit in the image plus spoken digit?",
    "video+audio": "Last digit in the video plus spoken digit?",
}
_ADD_TEXT = "Digit in the image plus {}?"


def _list_text(which: str, listed: Sequence[int]) -> str:
    return f"{which.capitalize()} of {','.join(map(str, listed))}?"


def _list_split(listed: Sequence[int]) -> str:
    remainder = (listed[0] + 3 * listed[1] + 5 * listed[2]) % 7
    return {0: "test", 1: "calibration"}.get(remainder, "train")


def question_stream(pool: Pool, split: str, kind: str, generator: np.random.Generator) -> Iterator[Question]:
    """Questions of one kind without end; every medium of the pool is used once before any is used again."""
    pictures, sounds, clips = (
        _deck(pool.pictures, generator),
        _deck(pool.sounds, generator),
        _deck(pool.clips, generator),
    )
    while True:
        if kind == "text":
            which = str(generator.choice(list(_LIST_QUESTIONS)))
            listed = [int(digit) for digit in generator.choice(10, LIST_LENGTH, replace=False)]
            while _list_split(listed) != split:
                listed = [int(digit) for digit in generator.choice(10, LIST_LENGTH, replace=False)]
            yield _question(kind, [], _list_text(which, listed), _LIST_QUESTIONS[which](listed))
        elif kind == "image":
            digit, path = next(pictures)
            yield _question(kind, [("image_url", path)], _TEXTS["image"], digit)
        elif kind == "audio":
            digit, path = next(sounds)
            yield _question(kind, [("audio_url", path)], _TEXTS["audio"], digit)
        elif kind == "video":
            (first, last), path = next(clips)
            which, digit = ("first", first) if generator.integers(2) else ("last", last)
            yield _question(kind, [("video_url", path)], _TEXTS[which], digit)
        elif kind == "image+text":
            digit, path = next(pictures)
            number = int(generator.integers(10))
            yield _question(kind, [("image_url", path)], _ADD_TEXT.format(number), digit + number)
        elif kind == "image+audio":
            (digit, path), (spoken, sound) = next(pictures), next(sounds)
            yield _question(kind, [("image_url", path), ("audio_url", sound)], _TEXTS[kind], digit + spoken)
        else:
            ((_, last), path), (spoken, sound) = next(clips), next(sounds)
            yield _question(kind, [("video_url", path), ("audio_url", sound)], _TEXTS[kind], last + spoken)


def _deck(items: Sequence[_T], generator: np.random.Generator) -> Iterator[_T]:
    while True:
        for index in generator.permutation(len(items)):
            yield items[index]


def _question(kind: str, media: Sequence[tuple[str, Path]], text: str, answer: int) -> Question:
    content: list[dict[str, Any]] = [{"type": part, part: {"url": str(path)}} for part, path in media]
    content.append({"type": "text", "text": text})
    return Question(kind, [{"role": "user", "content": content}], str(answer))


def _questions(work: Path, split: str, count_per_kind: int, seed: int) -> list[Question]:
    pool = media_pool(work, split)
    asked = []
    for number, kind in enumerate(KINDS):
        generator = np.random.default_rng([SPLIT_KINDS_SEED[split], number, seed])
        stream = question_stream(pool, split, kind, generator)
        asked += [next(stream) for _ in range(count_per_kind)]
    return asked


def test_questions(work: Path, count_per_kind: int = 300, seed: int = 0) -> list[Question]:
    """Questions on written digits, voices, speeds and lists that training never saw, kind after kind (see KINDS)."""
    return _questions(work, "test", count_per_kind, seed)


# pytest takes every function named test_* that a test module imports for a test.
test_questions.__test__ = False  # type: ignore[attr-defined]


def calibration_file(work: Path, seed: int = 0) -> Path:
    """A .jsonl of conversations with their answers for `morphoquant calibrate --data`, written unless it is there.

    Media are named relative to the file. They are neither those of training nor those of the test.
    """
    asked = _questions(work, "calibration", CALIBRATION_PER_KIND, seed)
    folder = work.resolve() / f"calibration-{settings_hash([seed, CALIBRATION_PER_KIND, [q.messages for q in asked]])}"
    path = folder / "conversations.jsonl"
    if path.is_file():
        return path
    order = np.random.default_rng(seed).permutation(len(asked))
    with staged(folder) as staging:
        lines = [json.dumps({"messages": _relative(asked[index], folder)}) for index in order]
        (staging / path.name).write_text("\n".join(lines) + "\n")
    return path


def _relative(question: Question, folder: Path) -> list[dict[str, Any]]:
    messages = json.loads(json.dumps(question.messages))
    for part in messages[0]["content"]:
        if part["type"] != "text":
            part[part["type"]]["url"] = os.path.relpath(part[part["type"]]["url"], folder)
    return [*messages, {"role": "assistant", "content": question.answer}]
