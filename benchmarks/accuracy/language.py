"""Perplexity of a language model on several texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.job import Job
from benchmarks.accuracy.settings import Settings
from benchmarks.common import corpus, texts
from benchmarks.common.files import digest, file_digest
from benchmarks.common.windows import evaluation_windows, write_calibration
from benchmarks.models import smollm2


def prepare(settings: Settings) -> Job:
    """Write the model and the calibration texts unless they exist, and cut the evaluation texts."""
    from transformers import AutoTokenizer

    settings.work.mkdir(parents=True, exist_ok=True)
    model = settings.model or smollm2.write_model(settings.work / smollm2.NAME)
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = corpus.fetch(settings.work / "corpus")
    size = settings.window_tokens
    folder = settings.work / f"calibration-{digest([dict(settings.calibration), size, file_digest([model])])[:16]}"
    windows = {name: evaluation_windows(tokenizer, source, name, size, settings.windows) for name in texts.EVALUATION}
    return Job(
        benchmark="language",
        settings=settings,
        model=model,
        calibration=write_calibration(tokenizer, source, folder, size, settings.calibration),
        max_samples=sum(settings.calibration.values()),
        evaluations={name: digest(cut) for name, cut in windows.items()},
        described=lambda name: {"windows": windows[name]},
        evaluate=lambda model, name: outcome(window_losses(model, windows[name]), windows[name]),
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
