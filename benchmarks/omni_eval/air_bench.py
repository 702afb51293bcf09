"""AIR-Bench Foundation (Yang et al., 2024, arXiv 2402.07729), as published: Foundation/Foundation_meta.json and audio.

The audio of an entry is Foundation/<task_name>_<dataset_name>/<path>. Prompt: the authors' inference script. Scored:
the chosen letter. AIR-Bench Chat is not here: it is scored by another model, which would have to be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.omni_eval.items import Item, lettered, listing, media_file, wrong_layout

NAME = "AIR-Bench"
SPLIT = "Foundation"
FIELDS = ("path", "question", "choice_a", "choice_b", "answer_gt", "task_name", "dataset_name", "uniq_id")
INSTRUCTION = (
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
    "you may only choose A or B or C or D."
)


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError where its layout is another or an audio file is missing."""
    folder = directory / split
    meta = folder / f"{split}_meta.json"
    if not meta.is_file():
        raise wrong_layout(directory, NAME, f"{split}/{split}_meta.json", listing(directory))
    try:
        entries = json.loads(meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise wrong_layout(meta, NAME, "JSON", str(error)) from error
    if not isinstance(entries, list):
        raise wrong_layout(meta, NAME, "a list of entries", type(entries).__name__)
    for number, entry in enumerate(entries):
        keys = list(entry) if isinstance(entry, dict) else [type(entry).__name__]
        if any(name not in keys for name in FIELDS):
            raise wrong_layout(meta, NAME, f"fields {', '.join(FIELDS)} in entry {number}", ", ".join(keys))
        texts = [entry[f"choice_{letter}"] for letter in "abcd" if entry.get(f"choice_{letter}") is not None]
        choices = lettered(texts)
        right = [letter for letter, text in choices.items() if text == entry["answer_gt"]]
        if not right:
            raise wrong_layout(meta, NAME, f"answer_gt of entry {number} among its choices", repr(entry["answer_gt"]))
        place = folder / f"{entry['task_name']}_{entry['dataset_name']}" / entry["path"]
        lines = [INSTRUCTION, entry["question"], *(f"{letter}. {text}" for letter, text in choices.items())]
        yield Item(
            id=str(entry["uniq_id"]),
            parts=(media_file(place, NAME, "audio", f"entry {number}"), "\n".join(lines)),
            choices=choices,
            answers=tuple(right),
            groups={"subject": entry["task_name"], "modality": "text+audio", "data set": entry["dataset_name"]},
        )
