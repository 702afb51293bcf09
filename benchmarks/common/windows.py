"""Cuts texts into evenly spaced windows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_atomically
from benchmarks.common.texts import CALIBRATION, CALIBRATION_WINDOWS, EVALUATION
from morphoquant_vllm.errors import MorphoQuantError


def spread(length: int, tokens: int, count: int, name: str) -> list[int]:
    """The starts of `count` evenly spaced windows of `tokens` tokens in a text; MorphoQuantError if they overlap."""
    if length < count * tokens:
        raise MorphoQuantError(
            f"text '{name}' has {length} tokens, {count} windows of {tokens} need {count * tokens}; use fewer windows"
        )
    last = length - tokens
    return [last // 2] if count == 1 else [index * last // (count - 1) for index in range(count)]


def evaluation_windows(tokenizer: Any, text: str, name: str, tokens: int, count: int) -> list[list[int]]:
    """`count` windows of token ids of a text; errors call it `name`.

    If the tokenizer begins texts with special tokens such as BOS, so does every window.
    """
    first = list(tokenizer("")["input_ids"])
    ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    size = tokens - len(first)
    return [[*first, *ids[start : start + size]] for start in spread(len(ids), size, count, name)]


def calibration_windows(tokenizer: Any, corpus: Path, tokens: int) -> list[list[int]]:
    """Evenly spaced windows of `tokens` token ids of every calibration text, as many as CALIBRATION_WINDOWS."""
    return [
        window
        for name, count in CALIBRATION_WINDOWS.items()
        for window in evaluation_windows(tokenizer, CALIBRATION[name](corpus), name, tokens, count)
    ]


def measuring_windows(tokenizer: Any, corpus: Path, tokens: int, count: int) -> dict[str, list[list[int]]]:
    """`count` evenly spaced windows of `tokens` token ids of each evaluation text, by its name."""
    return {name: evaluation_windows(tokenizer, text(corpus), name, tokens, count) for name, text in EVALUATION.items()}


def write_calibration(
    tokenizer: Any, texts: Mapping[str, str], directory: Path, tokens: int, counts: Mapping[str, int]
) -> list[Path]:
    """Write <domain>.txt files that `morphoquant calibrate` cuts into counts[domain] windows; return their paths.

    `texts` by domain. The excerpts are evenly spaced in each domain's text, with blank lines between them.
    """
    written = []
    for domain, count in counts.items():
        if not count:
            continue
        text = texts[domain]
        spans = _spans(tokenizer, text)
        starts = spread(len(spans), tokens, count, domain)
        excerpts = [text[spans[start][0] : spans[start + tokens - 1][1]] for start in starts]
        path = directory / f"{domain}.txt"
        # If the tokenizer adds a BOS token, calibration puts one before every window.
        room = tokens - len(tokenizer("")["input_ids"])
        write_atomically(path, _cut(tokenizer, "\n\n".join(excerpts), count * room))
        written.append(path)
    return written


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The longest prefix of `text` that has at most `tokens` tokens: one more would start another window."""
    spans = _spans(tokenizer, text)
    end = min(tokens, len(spans))
    # A cut inside a word may split it into more tokens than before.
    while len(_spans(tokenizer, text[: spans[end - 1][1]])) > tokens:
        end -= 1
    return text[: spans[end - 1][1]]


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """First and last character (exclusive) of every token of a text."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans: list[tuple[int, int]] = encoded["offset_mapping"]
    return spans


def excerpts(text: str, count: int, size: int) -> str:
    """`count` excerpts of `size` characters, evenly spaced over `text` in its order; all of a short one."""
    if len(text) <= count * size:
        return text
    stride = (len(text) - size) / max(1, count - 1)
    return "\n\n".join(text[round(index * stride) :][:size].strip() for index in range(count))
