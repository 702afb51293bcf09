"""ScienceQA (Lu et al., 2022, arXiv 2209.09513), as published on Hugging Face: data/test-*.parquet.

Prompt: lmms-eval's task `scienceqa`, question with context and lettered choices. Scored: the chosen letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.omni_eval.items import Item, embedded_image, lettered, listing, parquet_rows, wrong_layout

NAME = "ScienceQA"
SPLIT = "test"
COLUMNS = ("image", "question", "choices", "answer", "hint", "subject", "grade")
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError where its layout is another."""
    files = sorted((directory / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise wrong_layout(directory, NAME, f"data/{split}-*.parquet", listing(directory))
    for number, row in enumerate(parquet_rows(files, NAME, COLUMNS)):
        name = f"{split}-{number}"
        choices = lettered(row["choices"])
        if not 0 <= row["answer"] < len(choices):
            raise wrong_layout(directory, NAME, f"an answer below {len(choices)} in {name}", repr(row["answer"]))
        image = embedded_image(row["image"], NAME, f"{directory}: {name}")
        lines = [f"Context: {row['hint']}"] if row["hint"] else []
        lines += [row["question"], *(f"{letter}. {text}" for letter, text in choices.items()), INSTRUCTION]
        yield Item(
            id=name,
            parts=(*([image] if image else []), "\n".join(lines)),
            choices=choices,
            answers=(list(choices)[row["answer"]],),
            groups={
                "subject": row["subject"],
                "modality": "text+image" if image else "text",
                "grade": str(row["grade"]),
            },
        )
