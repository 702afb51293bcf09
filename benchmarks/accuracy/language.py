"""Perplexity of language models on several texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.job import Job
from benchmarks.accuracy.settings import Settings
from benchmarks.common import corpus, texts
from benchmarks.common.files import digest, file_digest
from benchmarks.common.windows import evaluation_windows, write_calibration
from benchmarks.models import gemma3, smollm2
from benchmarks.models.small_text import books
from benchmarks.models.small_text.train import TrainingSettings, trained_model

Texts = Mapping[str, Callable[[Path], str]]


@dataclass(frozen=True)
class LanguageModel:
    """A model, its evaluation and calibration texts, and the functions that fetch them."""

    # The model's directory, made unless it is there.
    write: Callable[[Settings], Path]
    # The directory of the texts, fetched unless they are there.
    fetch: Callable[[Settings], Path]
    evaluation: Texts
    calibration: Texts


def smollm2_model() -> LanguageModel:
    """SmolLM2-135M-Instruct, whose weights were on a 4-bit grid before."""
    return LanguageModel(
        write=lambda settings: smollm2.write_model(settings.work / smollm2.NAME),
        fetch=lambda settings: corpus.fetch(settings.work / "corpus"),
        evaluation=texts.EVALUATION,
        calibration=texts.CALIBRATION,
    )


def own_kinds_model() -> LanguageModel:
    """SmolLM2-135M-Instruct on three texts, calibrated on other texts of the same three kinds."""
    return LanguageModel(
        write=lambda settings: smollm2.write_model(settings.work / smollm2.NAME),
        fetch=lambda settings: books.fetch(settings.work / "corpus"),
        evaluation={
            "play": books.EVALUATION["play"],
            "documentation": texts.EVALUATION["documentation"],
            "code": texts.EVALUATION["code"],
        },
        calibration={
            "plays": books.CALIBRATION["plays"],
            "python-topics": texts.CALIBRATION["python-topics"],
            "numpy": texts.CALIBRATION["numpy"],
            "stdlib": texts.CALIBRATION["stdlib"],
        },
    )


def gemma_model() -> LanguageModel:
    """Gemma 3 270M, whose weights were on grids of 4 to 6 bits before: another architecture and another maker."""
    return LanguageModel(
        write=lambda settings: gemma3.write_model(settings.work / gemma3.NAME),
        fetch=lambda settings: corpus.fetch(settings.work / "corpus"),
        evaluation=texts.EVALUATION,
        calibration=texts.CALIBRATION,
    )


def small_text_model() -> LanguageModel:
    """The small Llama trained here: 16 bit by birth."""
    return LanguageModel(
        write=lambda settings: trained_model(settings.text_work, TrainingSettings(settings.seed), print),
        fetch=lambda settings: books.fetch(settings.text_work / "corpus"),
        evaluation=books.EVALUATION,
        calibration=books.CALIBRATION,
    )


# By the benchmark's name.
MODELS = {
    "language": smollm2_model,
    "own-kinds": own_kinds_model,
    "small-text": small_text_model,
    "gemma": gemma_model,
}


def prepare(benchmark: str, settings: Settings) -> Job:
    """Write model and calibration texts where they are missing, and cut the evaluation texts."""
    from transformers import AutoTokenizer

    settings.work.mkdir(parents=True, exist_ok=True)
    entry = MODELS[benchmark]()
    model = settings.model or entry.write(settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = entry.fetch(settings)
    size, counts = settings.window_tokens, settings.calibration_of(benchmark)
    number = settings.windows_of(benchmark)
    windows = {
        name: evaluation_windows(tokenizer, text(source), name, size, number) for name, text in entry.evaluation.items()
    }
    domains = {name: entry.calibration[name](source) for name, count in counts.items() if count}
    folder = settings.work / f"calibration-{digest([dict(counts), size, file_digest([model])])[:16]}"
    return Job(
        benchmark=benchmark,
        settings=settings,
        model=model,
        calibration=write_calibration(tokenizer, domains, folder, size, counts),
        max_samples=sum(counts.values()),
        evaluations={name: digest(cut) for name, cut in windows.items()},
        described=lambda name: {"windows": windows[name]},
        evaluate=lambda model, name: outcome(window_losses(model, windows[name]), windows[name]),
        engine=tuple(windows),
        process=tuple(windows),
    )


@torch.no_grad()
def window_losses(model: nn.Module, windows: Sequence[Sequence[int]]) -> list[float]:
    """Summed negative log probability of every token but the first, per window, from float32 logits."""
    losses = []
    for ids in windows:
        tokens = torch.tensor([list(ids)])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")))
    return losses


def outcome(losses: list[float], windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The stored result: losses of windows, and the number of their tokens."""
    return {"losses": losses, "tokens": sum(len(ids) - 1 for ids in windows)}
