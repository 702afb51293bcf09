"""Exact-match accuracy of a small Qwen2.5-Omni, per kind of question."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy.job import Job
from benchmarks.accuracy.settings import Settings
from benchmarks.common.files import digest

# More than the calibration file has, so all of its conversations are used.
MAX_SAMPLES = 512
# Name of the one evaluation set.
QUESTIONS = "questions"


def prepare(settings: Settings, progress: Callable[[str], None] = print) -> Job:
    """Train the model unless it exists, with lines to `progress`, and make the questions."""
    from transformers import AutoProcessor

    from benchmarks.models.tiny_omni.data.questions import calibration_file, test_questions
    from benchmarks.models.tiny_omni.evaluate import answers_transformers
    from benchmarks.models.tiny_omni.train import trained_model

    work = settings.omni_work
    work.mkdir(parents=True, exist_ok=True)
    model = settings.model or trained_model(work, settings.seed, progress=progress)
    questions = test_questions(work, settings.questions, settings.seed)

    def evaluate(thinker: Any, name: str) -> dict[str, Any]:
        processor = AutoProcessor.from_pretrained(model)
        return outcome(questions, answers_transformers(thinker, processor, questions, settings.batch_size))

    return Job(
        benchmark="omni",
        settings=settings,
        model=model,
        calibration=[calibration_file(work, settings.seed)],
        max_samples=MAX_SAMPLES,
        evaluations={QUESTIONS: questions_digest(questions)},
        described=lambda name: {"work": str(work.resolve()), "questions": settings.questions, "seed": settings.seed},
        evaluate=evaluate,
    )


def outcome(questions: Sequence[Any], answers: Sequence[str]) -> dict[str, Any]:
    """Right (1) or not (0) for every question, by kind, as benchmarks.models.tiny_omni scores it."""
    from benchmarks.models.tiny_omni.evaluate import accuracy

    right: dict[str, list[int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.kind, []).append(accuracy([question], [answer])["all"][0])
    return {"right": right}


def questions_digest(questions: Sequence[Any]) -> str:
    """Hash of questions, with their media by content, so the place of the files does not matter."""
    return digest([[question.kind, _portable(question.messages), question.answer] for question in questions])


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _media_digest(part) if name == "url" else _portable(part) for name, part in value.items()}
    return [_portable(part) for part in value] if isinstance(value, list) else value


@cache
def _media_digest(url: str) -> str:
    content = url.encode() if url.startswith("data:") else Path(url.removeprefix("file://")).read_bytes()
    return hashlib.sha256(content).hexdigest()
