"""AIR-Bench Foundation (Yang et al., 2024, arXiv 2402.07729), as published (qyang1021/AIR-Bench-Dataset).

Layout, prompt and rule: OFA-Sys/AIR-Bench, Inference_Foundation.py (commit 8d217d6) and score_foundation.py (commit
d5c1bdf). The questions are in Foundation/Foundation_meta.json, the audio in
Foundation/<task_name>_<dataset_name>/<path>. For Audio_Grounding the file is .flac, whatever `path` says. The prompt
names options C and D even if a question has only two ("C. None").

The rule takes the response's first letter, else its last but one ("The answer is A."), if that is A, B, C or D. Here
the letter must also stand alone ("Anyone" is not A). The authors leave responses without a letter out of the accuracy.
Here they count as not right, in a separate column. Chat: `air_bench_chat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.questions.items import Item, Media, check_cells, listing, read_json, wrong_layout
from benchmarks.common.questions.scoring import alone, chosen

NAME = "AIR-Bench Foundation"
SPLIT = "Foundation"
MAX_TOKENS = 256
FIELDS = ("path", "question", "choice_a", "choice_b", "answer_gt", "task_name", "dataset_name")
KINDS = dict.fromkeys(("path", "question", "task_name", "dataset_name"), str)
LETTERS = "ABCD"
INSTRUCTION = (
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
    "you may only choose A or B or C or D."
)


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy, named by their index in the file; MorphoQuantError if its layout differs."""
    for number, entry in entries(directory, split, FIELDS, NAME):
        texts = {letter: entry.get(f"choice_{letter.lower()}") for letter in LETTERS}
        choices = {letter: text for letter, text in texts.items() if text is not None}
        right = [letter for letter, text in choices.items() if text == entry["answer_gt"]]
        if not right:
            place = directory / split / f"{split}_meta.json"
            raise wrong_layout(place, NAME, f"answer_gt of entry {number} among its choices", repr(entry["answer_gt"]))
        options = (f"{letter}. {text}" for letter, text in texts.items())
        yield Item(
            id=str(number),
            parts=(audio(directory / split, entry), "\n".join((INSTRUCTION, entry["question"], *options))),
            choices=choices,
            answers=(right[0],),
            groups={"subject": entry["task_name"], "modality": "text+audio", "data set": entry["dataset_name"]},
            question=entry["question"],
        )


def entries(
    directory: Path, split: str, fields: Sequence[str], benchmark: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Entries of <split>/<split>_meta.json with their indices; the error of a wrong layout if one lacks a field."""
    meta = directory / split / f"{split}_meta.json"
    if not meta.is_file():
        raise wrong_layout(directory, benchmark, f"{split}/{split}_meta.json", listing(directory))
    for number, entry in enumerate(read_json(meta, benchmark, list)):
        keys = list(entry) if isinstance(entry, dict) else [type(entry).__name__]
        if any(name not in keys for name in fields):
            raise wrong_layout(meta, benchmark, f"fields {', '.join(fields)} in entry {number}", ", ".join(keys))
        check_cells(entry, KINDS, meta, benchmark, f"entry {number}")
        yield number, entry


def audio(folder: Path, entry: Mapping[str, Any]) -> Media:
    """The sound of an entry."""
    place = folder / f"{entry['task_name']}_{entry['dataset_name']}" / entry["path"]
    if entry["task_name"] == "Audio_Grounding":
        place = place.with_suffix(".flac")
    return Media("audio", place.suffix.lstrip(".").lower(), place)


def score(item: Item, response: str) -> str:
    """By the authors' rule, but that a letter inside a word is none."""
    text = response.strip().replace("\n", " ")
    places = [place for place in (0, len(text) - 2) if place >= 0 and text[place : place + 1] in tuple(LETTERS)]
    return chosen(item, next((text[place] for place in places if alone(text, place)), None))
