"""MMMU (Yue et al., 2023, arXiv 2311.16502), as published on Hugging Face: <Subject>/validation-*.parquet.

Prompt: the authors' evaluation (eval/configs/llava1.5.yaml of MMMU-Benchmark/MMMU), images where the text has
<image N>. Scored: multiple choice by letter; open questions by the authors' rule: a number equal to two decimals, or
the accepted string in the answer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.omni_eval.items import Item, Media, embedded_image, lettered, listing, parquet_rows, wrong_layout

NAME = "MMMU"
SPLIT = "validation"
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."
OPEN_INSTRUCTION = "Answer the question using a single word or phrase."
_IMAGE = re.compile(r"<image (\d+)>")


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError where its layout is another, or its answers are withheld."""
    files = sorted(directory.glob(f"*/{split}-*.parquet"))
    if not files:
        raise wrong_layout(directory, NAME, f"<Subject>/{split}-*.parquet", listing(directory))
    for path in files:
        for row in parquet_rows([path], NAME, COLUMNS):
            yield _item(row, path)


def _item(row: Mapping[str, Any], path: Path) -> Item:
    multiple = row["question_type"] == "multiple-choice"
    options = _list(row["options"], path, row["id"])
    choices = lettered(options) if multiple else {}
    answers = tuple(map(str, _list(row["answer"], path, row["id"]))) if _is_list(row["answer"]) else (row["answer"],)
    if row["answer"] == "?" or (multiple and answers[0] not in choices):
        raise wrong_layout(
            path, NAME, f"the answer of {row['id']}", f"{row['answer']!r} (answers of test are withheld)"
        )
    lettered_options = "\n".join(f"({letter}) {text}" for letter, text in choices.items())
    instruction = CHOICE_INSTRUCTION if multiple else OPEN_INSTRUCTION
    text = "\n\n".join(part for part in (row["question"], lettered_options, instruction) if part)
    return Item(
        id=row["id"],
        parts=tuple(_interleave(text, row, path)),
        choices=choices,
        answers=answers,
        groups={
            "subject": path.parent.name,
            "modality": "text+image",
            "question_type": row["question_type"],
        },
    )


def _interleave(text: str, row: Mapping[str, Any], path: Path) -> Iterator[str | Media]:
    """Text and images in the order of the placeholders; an image shown twice is sent twice."""
    for index, piece in enumerate(_IMAGE.split(text)):
        if index % 2 == 0:
            if piece.strip():
                yield piece
            continue
        image = embedded_image(row.get(f"image_{piece}"), NAME, f"{path}: {row['id']}")
        if image is None:
            raise wrong_layout(path, NAME, f"image_{piece} of {row['id']}", "an empty cell")
        yield image


def _is_list(value: str) -> bool:
    return value.startswith("[")


def _list(value: str, path: Path, name: str) -> list[str]:
    """Lists are stored as Python's repr of them."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise wrong_layout(path, NAME, f"a list in {name}", repr(value)) from error
    return [str(entry) for entry in found]
