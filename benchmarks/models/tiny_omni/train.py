"""Trains the benchmark's model from scratch on a CPU, and caches it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoProcessor

from benchmarks.common.files import staged
from benchmarks.common.machine import torch_threads
from benchmarks.models.tiny_omni.data.encoding import Encoder
from benchmarks.models.tiny_omni.data.pool import SPLITS, media_pool, settings_hash
from benchmarks.models.tiny_omni.data.questions import KINDS, Question, all_texts, question_stream
from benchmarks.models.tiny_omni.experts import EXPERTS, ExpertsSettings
from benchmarks.models.tiny_omni.model import DENSE, Family, ModelSettings
from benchmarks.models.training import keep, resume

logger = logging.getLogger(__name__)

# How many questions of each kind a step holds, and until which share of the steps. Clips are long: they come when
# pictures and sums are known, and need few steps then. Kinds that stand together are run together: of like length.
Batch = tuple[dict[str, int], ...]
STAGES: tuple[tuple[float, Batch], ...] = (
    (0.3, ({"text": 12, "image": 12, "image+text": 8}, {"audio": 12})),
    (1.0, ({"text": 12, "image": 6, "image+text": 8}, {"audio": 6, "image+audio": 8}, {"video": 8, "video+audio": 6})),
)
# Steps between lines of progress, and between states from which an interrupted training goes on.
LOG_EVERY = 50
KEEP_EVERY = 50


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that the trained weights depend on, except the machine's arithmetic.

    `threads`: how many of torch's; another number adds in another order.
    """

    seed: int = 0
    threads: int = 2
    steps: int = 1400
    warmup: int = 60
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    model: ModelSettings = field(default_factory=ModelSettings)


def experts_training(seed: int = 0) -> TrainingSettings:
    """Settings of the mixture of experts. One thread for each of a step's passes, which run side by side."""
    return TrainingSettings(seed, threads=1, model=ExpertsSettings())


def trained_model(
    work: Path,
    seed: int = 0,
    settings: TrainingSettings | None = None,
    progress: Callable[[str], None] = logger.info,
) -> Path:
    """The model directory, trained in `work` unless a model of the same settings is there; `settings` have their seed.

    It appears only when training has ended; an interrupted training goes on. Raises MorphoQuantError if espeak-ng is
    missing.
    """
    settings = settings or TrainingSettings(seed)
    target = model_path(work, settings)
    if not target.is_dir():
        kept = target.with_suffix(".state")
        with staged(target) as staging, torch.random.fork_rng(), torch_threads(settings.threads):
            _train(staging, work, settings, kept, progress)
        kept.unlink(missing_ok=True)
    return target


def model_path(work: Path, settings: TrainingSettings) -> Path:
    """Directory of the model of these settings; it need not exist."""
    data = [asdict(SPLITS["train"]), STAGES, all_texts()]
    return work.resolve() / f"model-{settings_hash([asdict(settings), data])}"


def family_of(settings: ModelSettings) -> Family:
    """The family of models that the settings size."""
    return EXPERTS if isinstance(settings, ExpertsSettings) else DENSE


def _train(
    directory: Path, work: Path, settings: TrainingSettings, kept: Path, progress: Callable[[str], None]
) -> None:
    torch.manual_seed(settings.seed)
    family = family_of(settings.model)
    ids = family.write_files(directory)
    model = family.initial_model(settings.model, ids)
    thinker = model.thinker
    # bfloat16 pixels: their noise is coarser.
    encoder = Encoder(AutoProcessor.from_pretrained(directory), torch.bfloat16, family.kept)
    streams = _streams(work, settings.seed)
    frozen = _freeze_rows(family.heavy_rows(thinker, settings.model))
    optimizer = torch.optim.AdamW(_groups(thinker, frozen, settings), betas=(0.9, 0.98))
    done = resume(kept, thinker, optimizer)
    started, exact = time.monotonic(), _Exact()
    thinker.train()
    parameters = [parameter for parameter in thinker.parameters() if parameter.requires_grad]

    def one_pass(count: int, size: int, batch: dict[str, Tensor]) -> tuple[Sequence[Tensor | None], list[bool]]:
        loss, right = _loss(thinker, batch, settings.model)
        return torch.autograd.grad(loss * count / size, parameters, allow_unused=True), right

    with _fast_patches(thinker.visual), ThreadPoolExecutor() as side_by_side:
        for step, passes in enumerate(_prepared(done, settings.steps, streams, encoder), start=done + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(settings, step - 1)
            size = sum(len(questions) for questions, _ in passes)
            # A pass alone keeps little more than one core busy. Gradients are added in the order of the passes.
            running = [side_by_side.submit(one_pass, len(questions), size, batch) for questions, batch in passes]
            for (questions, _), future in zip(passes, running, strict=True):
                gradients, right = future.result()
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                exact.add(questions, right)
            nn.utils.clip_grad_norm_(thinker.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                progress(f"step {step}/{settings.steps}  {exact}  {time.monotonic() - started:.0f} s")
                exact = _Exact()
            if step % KEEP_EVERY == 0:
                keep(kept, step, thinker, optimizer)
    family.write_model(directory, model.eval(), ids)


class _Exact:
    """The share of training questions of each kind that were answered exactly."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def add(self, questions: Sequence[Question], right: Sequence[bool]) -> None:
        for question, correct in zip(questions, right, strict=True):
            count = self.counts.setdefault(question.kind, [0, 0])
            count[0] += correct
            count[1] += 1

    def __str__(self) -> str:
        return "exact: " + ", ".join(f"{kind} {right / total:.0%}" for kind, (right, total) in self.counts.items())


def _streams(work: Path, seed: int) -> dict[str, Iterator[Question]]:
    pool = media_pool(work, "train")
    return {
        kind: question_stream(pool, "train", kind, np.random.default_rng([0, number, seed]))
        for number, kind in enumerate(KINDS)
    }


def _prepared(
    done: int, steps: int, streams: Mapping[str, Iterator[Question]], encoder: Encoder
) -> Iterator[list[tuple[list[Question], dict[str, Tensor]]]]:
    """The passes of each step after `done`: their questions, encoded while the step before is trained on."""

    def drawn(step: int) -> list[list[Question]]:
        passes = next(batch for until, batch in STAGES if step <= until * steps)
        return [[next(streams[kind]) for kind, count in kinds.items() for _ in range(count)] for kinds in passes]

    def prepare(step: int) -> list[tuple[list[Question], dict[str, Tensor]]]:
        return [(questions, encoder.batch(questions, with_answers=True)) for questions in drawn(step)]

    for step in range(1, done + 1):
        drawn(step)
    with ThreadPoolExecutor(max_workers=1) as ahead:
        following = ahead.submit(prepare, done + 1)
        for step in range(done + 1, steps + 1):
            passes = following.result()
            if step < steps:
                following = ahead.submit(prepare, step + 1)
            yield passes


def _loss(thinker: nn.Module, batch: dict[str, Tensor], settings: ModelSettings) -> tuple[Tensor, list[bool]]:
    """Mean cross-entropy of the answers' tokens, and which answers were exact; `batch` as Encoder.batch makes it.

    With experts the loss of unequal use is added.
    """
    labels = batch.pop("labels")[:, 1:]
    routed = isinstance(settings, ExpertsSettings)
    output = thinker(**batch, use_cache=False, **({"output_router_logits": True} if routed else {}))
    logits = output.logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    if isinstance(settings, ExpertsSettings):
        loss = loss + settings.balance * output.aux_loss
    return loss, ((logits.argmax(-1) == labels) | (labels < 0)).all(-1).tolist()


def _freeze_rows(holders: list[tuple[nn.Parameter, Tensor]]) -> list[nn.Parameter]:
    """Keep the heavy rows' gradients at zero; return the parameters that hold such rows."""
    for parameter, rows in holders:
        parameter.register_hook(partial(_without_rows, rows))
    return [parameter for parameter, _ in holders]


def _without_rows(rows: Tensor, gradient: Tensor) -> Tensor:
    return gradient.index_fill(0, rows, 0.0)


def _groups(thinker: nn.Module, frozen: list[nn.Parameter], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Matrices decay, but not those with frozen rows: decay would move these."""
    held = {id(parameter) for parameter in frozen}
    parameters = list(thinker.parameters())
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in held]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in held]
    return [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(settings: TrainingSettings, step: int) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))


@contextmanager
def _fast_patches(visual: Any) -> Iterator[None]:
    """Multiply patches by the embedding's matrix: the same numbers, but a convolution would take most of a step."""
    embedding = visual.patch_embed

    def forward(hidden_states: Tensor) -> Tensor:
        weight = embedding.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward
