"""Texts to evaluate on and, none of them among these, texts to calibrate on; cut into windows of tokens."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cache import write_atomically
from benchmarks.demo.texts import python_topics, torch_documentation
from morphoquant_vllm.errors import MorphoQuantError

EVALUATION_MODULES = ("argparse", "tarfile", "statistics")
CALIBRATION_MODULES = (
    "asyncio.base_events",
    "csv",
    "difflib",
    "email.message",
    "http.client",
    "json.decoder",
    "logging",
    "pathlib",
    "subprocess",
)
LICENCE = Path(__file__).parents[2] / "LICENSE"


def _source(modules: Sequence[str]) -> str:
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)


def _numpy_documentation() -> str:
    """The docstrings of numpy's functions and classes."""
    import numpy

    members = [getattr(space, name) for space in (numpy, numpy.linalg, numpy.fft) for name in sorted(space.__all__)]
    return "\n\n".join(dict.fromkeys(inspect.getdoc(member) or "" for member in members if callable(member)))


def _book(name: str) -> Callable[[Path], str]:
    return lambda corpus: (corpus / name).read_text(encoding="latin-1").replace("\r\n", "\n")


# By name: what makes the text, given the directory of corpus.fetch.
EVALUATION: dict[str, Callable[[Path], str]] = {
    "fiction": _book("alice29.txt"),
    "play": _book("asyoulik.txt"),
    "documentation": lambda corpus: torch_documentation(),
    "code": lambda corpus: _source(EVALUATION_MODULES),
}
CALIBRATION: dict[str, Callable[[Path], str]] = {
    "python-topics": lambda corpus: python_topics()[0],
    "report": _book("lcet10.txt"),
    "poetry": _book("plrabn12.txt"),
    "numpy": lambda corpus: _numpy_documentation(),
    "stdlib": lambda corpus: _source(CALIBRATION_MODULES),
    "licence": lambda corpus: LICENCE.read_text(encoding="utf-8"),
}


def spread(length: int, tokens: int, count: int, name: str) -> list[int]:
    """Where `count` windows of `tokens` tokens start that lie evenly in a text; MorphoQuantError if they overlap."""
    if length < count * tokens:
        raise MorphoQuantError(
            f"text '{name}' has {length} tokens, {count} windows of {tokens} need {count * tokens}; use fewer windows"
        )
    last = length - tokens
    return [last // 2] if count == 1 else [index * last // (count - 1) for index in range(count)]


def evaluation_windows(tokenizer: Any, corpus: Path, name: str, tokens: int, count: int) -> list[list[int]]:
    """`count` windows of token ids of an evaluation text."""
    ids = tokenizer(EVALUATION[name](corpus), verbose=False)["input_ids"]
    return [list(ids[start : start + tokens]) for start in spread(len(ids), tokens, count, name)]


def write_calibration(
    tokenizer: Any, corpus: Path, directory: Path, tokens: int, counts: Mapping[str, int]
) -> list[Path]:
    """Write <domain>.txt files that `morphoquant calibrate` cuts into counts[domain] windows; return their paths.

    The excerpts lie evenly in each domain's text, with blank lines between them.
    """
    written = []
    for domain, count in counts.items():
        if not count:
            continue
        text = CALIBRATION[domain](corpus)
        spans = _spans(tokenizer, text)
        starts = spread(len(spans), tokens, count, domain)
        excerpts = [text[spans[start][0] : spans[start + tokens - 1][1]] for start in starts]
        path = directory / f"{domain}.txt"
        # Where the tokenizer adds a BOS token, calibration puts one before every window.
        room = tokens - len(tokenizer("")["input_ids"])
        write_atomically(path, _cut(tokenizer, "\n\n".join(excerpts), count * room))
        written.append(path)
    return written


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The longest beginning of `text` that has at most `tokens` tokens: one more would open a window of its own."""
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
