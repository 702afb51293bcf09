"""MMMU (Yue et al., 2023, arXiv 2311.16502), as published on Hugging Face (MMMU/MMMU): <Subject>/validation-*.parquet.

Prompt: the authors' for LLaVA 1.5, from MMMU-Benchmark/MMMU, configs/llava1.5.yaml, and construct_prompt of
utils/data_utils.py, which ends every option with a newline. The authors' answer to issue 9 has the same prompt without
YAML. lm-eval and VILA have blank lines in place of the template's line breaks: a YAML scalar in quotes folds each blank
line into one break. Images replace <image N> in the text. The authors sent only the first image, before the text, since
the models of that time took one (issues 9 and 16). Rules: `mmmu_rules`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.questions.datasets.mmmu_rules import choice, matches
from benchmarks.common.questions.items import Item, Media, embedded_image, lettered, listing, parquet_rows, wrong_layout
from benchmarks.common.questions.scoring import RIGHT, UNPARSED, WRONG, chosen

NAME = "MMMU"
SPLIT = "validation"
MAX_TOKENS = 128
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
KINDS = dict.fromkeys(COLUMNS[:-1], str)
CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."
OPEN_INSTRUCTION = "Answer the question using a single word or phrase."
# MMMU-Benchmark/MMMU, eval/data_utils.py (DOMAIN_CAT2SUB_CAT): the six figures that the authors report.
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
_IMAGE = re.compile(r"<image (\d+)>")


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError if its layout differs or its answers are withheld."""
    files = sorted(directory.glob(f"*/{split}-*.parquet"))
    if not files:
        raise wrong_layout(directory, NAME, f"<Subject>/{split}-*.parquet", listing(directory))
    for path in files:
        for row in parquet_rows([path], NAME, COLUMNS, KINDS):
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
    subject = path.parent.name
    return Item(
        id=row["id"],
        parts=tuple(_interleave(prompt(row["question"], choices), row, path)),
        choices=choices,
        answers=answers,
        groups={
            "discipline": _DISCIPLINE.get(subject, "other"),
            "subject": subject,
            "modality": "text+image",
            "question_type": row["question_type"],
        },
        question=row["question"],
        images=tuple(_images(row, path)),
    )


def prompt(question: str, choices: Mapping[str, str]) -> str:
    """The text of the question, with <image N> in place of images."""
    if not choices:
        return f"{question}\n{OPEN_INSTRUCTION}"
    options = "".join(f"({letter}) {text}\n" for letter, text in choices.items())
    return f"{question}\n{options}\n{CHOICE_INSTRUCTION}"


def _images(row: Mapping[str, Any], path: Path) -> Iterator[Media]:
    """All images of a question, in the order of their columns."""
    for column in sorted(name for name in row if re.fullmatch(r"image_\d+", name)):
        image = embedded_image(row[column], NAME, f"{path}: {row['id']}")
        if image is not None:
            yield image


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


def score(item: Item, response: str) -> str:
    """Score by the authors' rules, except that a random guess of theirs counts as not parsed."""
    if item.choices:
        return chosen(item, choice(response, item.choices))
    if not response.strip():
        return UNPARSED
    return RIGHT if matches(response, item.answers) else WRONG


def _is_list(value: str) -> bool:
    return value.startswith("[")


def _list(value: str, path: Path, name: str) -> list[str]:
    """Lists are stored as Python's repr of them."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise wrong_layout(path, NAME, f"a list in {name}", repr(value)) from error
    return [str(entry) for entry in found]
