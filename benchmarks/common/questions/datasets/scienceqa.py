"""ScienceQA (Lu et al., 2022, arXiv 2209.09513), in either of its published layouts.

Layout: that of Hugging Face's derek-thomas/ScienceQA (data/test-*.parquet), or the authors' own: problems.json,
pid_splits.json and images/<split>/<id>/image.png (lupantech/ScienceQA, models/run_gpt3.py, tools/download.sh and
tools/generate_caption.py, commit 360b71c).

Prompt and rule: lmms-eval 0.7.3, tasks/scienceqa/scienceqa.yaml and utils.py (sqa_doc_to_text, sqa_process_results),
which are LLaVA's. The authors' own prompt (models/base_prompt.py) is for few-shot GPT-3 that reads captions. Groups
are those of the authors' tools/evaluate_acc.py: subject, grades 1-6 and 7-12, context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.questions.items import (
    Item,
    Media,
    check_cells,
    embedded_image,
    lettered,
    listing,
    parquet_rows,
    read_json,
    wrong_layout,
)
from benchmarks.common.questions.scoring import chosen

NAME = "ScienceQA"
SPLIT = "test"
MAX_TOKENS = 16
COLUMNS = ("image", "question", "choices", "answer", "hint", "subject", "grade")
KINDS = {"question": str, "choices": list, "answer": int, "subject": str}
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError if its layout differs."""
    if (directory / "problems.json").is_file():
        yield from _load_json(directory, split)
        return
    files = sorted((directory / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise wrong_layout(directory, NAME, f"data/{split}-*.parquet or problems.json", listing(directory))
    for number, row in enumerate(parquet_rows(files, NAME, COLUMNS, KINDS)):
        name = f"{split}-{number}"
        yield _item(name, row, embedded_image(row["image"], NAME, f"{directory}: {name}"), directory)


def _load_json(directory: Path, split: str) -> Iterator[Item]:
    problems, splits = (
        read_json(directory / "problems.json", NAME, dict),
        read_json(directory / "pid_splits.json", NAME, dict),
    )
    if split not in splits:
        raise wrong_layout(directory / "pid_splits.json", NAME, f"the split {split}", ", ".join(splits) or "no split")
    for name in splits[split]:
        row = problems.get(name, {})
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise wrong_layout(
                directory / "problems.json", NAME, f"{', '.join(missing)} of problem {name}", json.dumps(sorted(row))
            )
        check_cells(row, KINDS, directory / "problems.json", NAME, f"problem {name}")
        place = directory / "images" / split / name / str(row["image"])
        yield _item(name, row, Media("image", place.suffix.lstrip("."), place) if row["image"] else None, directory)


def _item(name: str, row: Mapping[str, Any], image: Media | None, directory: Path) -> Item:
    choices = lettered(row["choices"])
    if not 0 <= row["answer"] < len(choices):
        raise wrong_layout(directory, NAME, f"an answer below {len(choices)} in {name}", repr(row["answer"]))
    lines = [f"Context: {row['hint']}"] if row["hint"] else []
    lines += [row["question"], *(f"{letter}. {text}" for letter, text in choices.items()), INSTRUCTION]
    context = " and ".join(kind for kind, present in (("text", row["hint"]), ("image", image)) if present)
    return Item(
        id=name,
        parts=(*([image] if image else []), "\n".join(lines)),
        choices=choices,
        answers=(list(choices)[row["answer"]],),
        groups={
            "subject": row["subject"],
            "modality": "text+image" if image else "text",
            "context": context or "none",
            "grades": "1-6" if row["grade"] in {f"grade{number}" for number in range(1, 7)} else "7-12",
        },
        question=row["question"],
        context=row["hint"],
        images=(image,) if image else (),
    )


def score(item: Item, response: str) -> str:
    """A letter alone, in either case, or a response that begins like "B."; anything else is not parsed."""
    text = response.strip()
    letter = text.upper() if len(text) == 1 else text[:1] if text[1:2] == "." else ""
    return chosen(item, letter if letter in item.choices else None)
