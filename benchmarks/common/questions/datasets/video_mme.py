"""Video-MME (Fu et al., 2024, arXiv 2405.21075), as published on Hugging Face (lmms-lab/Video-MME).

Layout: videomme/test-*.parquet, data/<videoID>.mp4 (.MP4, .mkv) and subtitle/<videoID>.srt, as lmms-eval 0.7.3
(tasks/videomme/utils.py) and VLMEvalKit (vlmeval/dataset/videomme.py, commit 00fff54) read it. Videos may also lie in
another of FOLDERS. One that is in none is read from the published archives, videos_chunked_*.zip; subtitles must be
unpacked.

Prompt: "The common prompt used in our evaluation", README of MME-Benchmarks/Video-MME (commit 120729e), with or
without subtitles. Rule: extract_characters_regex of BradyFU/Video-MME, evaluation/eval_your_results.py (commit
4e7566d): without phrases like "The best answer is", the first of A, B, C, D. This rule differs in two ways. Only a
letter that stands alone counts (the authors' takes the C of "Cannot tell"). Two commas that the authors' list of
phrases lacks are added, so "Best option: C" is C, not B. The authors leave responses without a letter out of the
accuracy. Here they count as not right, in a separate column.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.common.questions.datasets.subtitles import subtitles_of
from benchmarks.common.questions.items import Item, Media, listing, parquet_rows, wrong_layout
from benchmarks.common.questions.scoring import alone, chosen

NAME = "Video-MME"
SPLIT = "test"
MAX_TOKENS = 16
COLUMNS = ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question", "options", "answer")
KINDS = {column: list if column == "options" else str for column in COLUMNS}
SUBTITLES = "This video's subtitles are listed below:"
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
CLOSING = "The best answer is:"
SUFFIXES = (".mp4", ".MP4", ".mkv")
# Where unpacked videos lie: as published, and as VLMEvalKit and others unpack them.
FOLDERS = ("data", "video", "videos/data", "videos")
ARCHIVES = "videos_chunked_*.zip"
PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def load(directory: Path, split: str = SPLIT, *, subtitles: int | None = None) -> Iterator[Item]:
    """Questions of a local copy; MorphoQuantError if its layout differs.

    subtitles: None for the setting without them; otherwise those at this many frames, evenly spaced over the video,
    or all of them for 0.
    """
    files = sorted((directory / "videomme").glob(f"{split}-*.parquet"))
    if not files:
        raise wrong_layout(directory, NAME, f"videomme/{split}-*.parquet and data/*.mp4", listing(directory))
    if subtitles is not None and not any((directory / "subtitle").glob("*.srt")):
        raise wrong_layout(directory, NAME, "subtitle/*.srt", listing(directory / "subtitle"))
    archived = _archived(directory)
    for row in parquet_rows(files, NAME, COLUMNS, KINDS):
        name = row["question_id"]
        # Published as "A. Apples."
        choices = {option[:1]: option[2:].strip() for option in row["options"]}
        if row["answer"] not in choices:
            raise wrong_layout(directory, NAME, f"the answer of {name} among its options", repr(row["answer"]))
        video = _video(directory, row["videoID"], archived)
        spoken = [] if subtitles is None else _spoken(directory, row["videoID"], video, subtitles)
        lines = [SUBTITLES, *spoken] if spoken else []
        groups = {
            "subject": row["domain"],
            "modality": "text+video",
            "duration": row["duration"],
            "subcategory": row["sub_category"],
            "task": row["task_type"],
        }
        if subtitles is not None:
            groups["subtitles"] = "with" if spoken else "none"
        yield Item(
            id=name,
            parts=(
                Media("video", "mp4" if video.suffix.lower() == ".mp4" else "x-matroska", video),
                "\n".join((*lines, INSTRUCTION, row["question"], *row["options"], CLOSING)),
            ),
            choices=choices,
            answers=(row["answer"],),
            groups=groups,
            question=row["question"],
        )


def _video(directory: Path, name: str, archived: Mapping[str, zipfile.Path]) -> Path | zipfile.Path:
    """The video's file or its member of an archive; else the first possible name, which `present` then reports."""
    places = [directory / folder / f"{name}{suffix}" for folder in FOLDERS for suffix in SUFFIXES]
    members = (archived[place.name] for place in places if place.name in archived)
    return next((place for place in places if place.is_file()), next(members, places[0]))


def _archived(directory: Path) -> dict[str, zipfile.Path]:
    """Videos in the published archives, by file name; the wrong layout if an archive cannot be read."""
    members: dict[str, zipfile.Path] = {}
    for place in sorted(directory.glob(ARCHIVES)):
        try:
            archive = zipfile.ZipFile(place)
        except (zipfile.BadZipFile, OSError) as error:
            raise wrong_layout(place, NAME, "a zip archive", str(error)) from error
        names = [name for name in archive.namelist() if name.endswith(SUFFIXES)]
        members |= {name.rsplit("/", 1)[-1]: zipfile.Path(archive, name) for name in names}
    return members


def _spoken(directory: Path, name: str, video: Path | zipfile.Path, frames: int) -> list[str]:
    """Texts of a video's subtitles; empty if it has no file, as for 156 of the 900 videos."""
    place = directory / "subtitle" / f"{name}.srt"
    return subtitles_of(place, video, frames, NAME) if place.is_file() and video.is_file() else []


def score(item: Item, response: str) -> str:
    """By the authors' rule, but that a letter inside a word is none."""
    for phrase in PHRASES:
        response = response.replace(phrase, "")
    found = (match.start() for match in re.finditer(f"[{''.join(item.choices)}]", response))
    return chosen(item, next((response[place] for place in found if alone(response, place)), None))
