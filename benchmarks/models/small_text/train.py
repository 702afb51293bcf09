"""Trains the small language model from scratch on a CPU, and caches it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.files import digest, staged
from benchmarks.common.machine import torch_threads
from benchmarks.models.small_text import books
from benchmarks.models.small_text.tokenizer import write_tokenizer
from benchmarks.models.training import keep, resume

logger = logging.getLogger(__name__)

# Steps between lines of progress, and between states from which an interrupted training goes on.
LOG_EVERY = 50
KEEP_EVERY = 100


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that the trained weights depend on, except the machine's arithmetic.

    `threads`: how many of torch's; another number adds in another order. A step sees `batch` windows of `window`
    tokens.
    """

    seed: int = 0
    threads: int = 2
    vocabulary: int = 4096
    # Narrow and deep: in a wide model the rounding errors of many weights even out.
    hidden: int = 128
    intermediate: int = 384
    layers: int = 8
    heads: int = 2
    window: int = 512
    batch: int = 4
    steps: int = 2500
    warmup: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.1


def trained_model(
    work: Path, settings: TrainingSettings | None = None, progress: Callable[[str], None] = logger.info
) -> Path:
    """The model directory, trained in `work` unless a model of the same settings is there.

    It appears only when training has ended. Raises MorphoQuantError if the texts cannot be fetched.
    """
    settings = settings or TrainingSettings()
    key = [asdict(settings), books.ARCHIVES, books.HELD_OUT_PLAYS, books.HELD_OUT_BOOKS]
    target = work.resolve() / f"small-text-{digest(key)[:12]}"
    if not target.is_dir():
        kept = target.with_suffix(".state")
        with staged(target) as staging, torch.random.fork_rng(), torch_threads(settings.threads):
            _train(staging, books.training_books(books.fetch(work / "corpus")), settings, kept, progress)
        kept.unlink(missing_ok=True)
    return target


def _train(
    directory: Path, texts: Sequence[str], settings: TrainingSettings, kept: Path, progress: Callable[[str], None]
) -> None:
    tokenizer = write_tokenizer(directory, texts, settings.vocabulary)
    tokens = torch.tensor([token for text in texts for token in _book(tokenizer, text)])
    model = initial_model(settings, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), betas=(0.9, 0.95))
    done = resume(kept, model, optimizer)
    started, losses = time.monotonic(), []
    for step in range(done, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings)
        windows = draw(tokens, step, settings)
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            mean = sum(losses) / len(losses)
            progress(f"step {step + 1}/{settings.steps}  loss {mean:.3f}  {time.monotonic() - started:.0f} s")
            losses = []
        if (step + 1) % KEEP_EVERY == 0:
            keep(kept, step + 1, model, optimizer)
    model.to(torch.bfloat16).save_pretrained(directory)


def _book(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def initial_model(settings: TrainingSettings, end: int) -> LlamaForCausalLM:
    """The model in float32, drawn from the seed; `end` is the token that ends a text."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=2 * settings.window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config).float().train()


def draw(tokens: Tensor, step: int, settings: TrainingSettings) -> Tensor:
    """The windows of a step, [batch, window]: the same whether the steps before ran in this process or not."""
    generator = torch.Generator().manual_seed(settings.seed * settings.steps + step)
    starts = torch.randint(len(tokens) - settings.window, (settings.batch,), generator=generator)
    return torch.stack([tokens[start : start + settings.window] for start in starts.tolist()])


def rate(step: int, settings: TrainingSettings) -> float:
    """Part of the learning rate at a step: up to all of it in the warm-up, then down to nothing in a straight line."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return (settings.steps - step) / (settings.steps - settings.warmup)


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
