"""Video-MME (Fu et al., 2024, arXiv 2405.21075), as published on Hugging Face with its archives unpacked.

videomme/test-*.parquet and data/<videoID>.mp4. Prompt: the authors', without subtitles. Scored: the chosen letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.omni_eval.items import Item, listing, media_file, parquet_rows, wrong_layout

NAME = "Video-MME"
SPLIT = "test"
COLUMNS = ("videoID", "question_id", "duration", "domain", "task_type", "question", "options", "answer")
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
CLOSING = "The best answer is:"


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError where its layout is another or a video is missing."""
    files = sorted((directory / "videomme").glob(f"{split}-*.parquet"))
    if not files:
        raise wrong_layout(directory, NAME, f"videomme/{split}-*.parquet and data/*.mp4", listing(directory))
    for row in parquet_rows(files, NAME, COLUMNS):
        name = row["question_id"]
        # Published as "A. Apples."
        choices = {option[:1]: option[2:].strip() for option in row["options"]}
        if row["answer"] not in choices:
            raise wrong_layout(directory, NAME, f"the answer of {name} among its options", repr(row["answer"]))
        video = media_file(directory / "data" / f"{row['videoID']}.mp4", NAME, "video", name)
        yield Item(
            id=name,
            parts=(video, "\n".join((INSTRUCTION, row["question"], *row["options"], CLOSING))),
            choices=choices,
            answers=(row["answer"],),
            groups={
                "subject": row["domain"],
                "modality": "text+video",
                "duration": row["duration"],
                "task": row["task_type"],
            },
        )
