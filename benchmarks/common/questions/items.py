"""One question of a benchmark, and how a folder of the wrong layout is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from morphoquant_vllm.errors import MorphoQuantError

T = TypeVar("T")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Entries of a folder that a refusal names.
NAMED = 8
# A file of Git LFS that was not fetched: how it begins, and more bytes than it has.
POINTER, POINTER_BYTES = b"version https://git-lfs", 1024


# What `check_cells` asks for, in words.
_KINDS = {str: "a text", int: "an integer", list: "a list of texts"}


@dataclass(frozen=True)
class Media:
    """A file of the data set, or its bytes; read when its question is asked. kind: image, audio or video."""

    kind: str
    # As file name extension: png, wav, mp4.
    format: str
    # A member of an archive is read in its place.
    source: bytes | Path | zipfile.Path

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Item:
    """One question: its parts in order, and the right answer."""

    id: str
    parts: tuple[str | Media, ...]
    # Choice texts by letter; empty for an open question.
    choices: Mapping[str, str]
    # The right letter; of an open question every accepted answer.
    answers: tuple[str, ...]
    # Groups by which accuracy is broken down: always "subject" and "modality", and others of the benchmark.
    groups: Mapping[str, str] = field(default_factory=dict)
    # Description of the media for a judge, if the benchmark has one.
    description: str = ""
    # The question alone, what is told before it, and its images in the order of the data set: for other prompts.
    question: str = ""
    context: str = ""
    images: tuple[Media, ...] = ()


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """Choice texts by letter, A first."""
    return dict(zip(LETTERS, texts, strict=False))


def wrong_layout(place: Path, benchmark: str, expected: str, found: str) -> MorphoQuantError:
    """The error for a folder or file that is not as the benchmark publishes it."""
    return MorphoQuantError(f"{place}: not the layout of {benchmark}: expected {expected}; found {found}")


def listing(directory: Path) -> str:
    """A few names of a folder, for `wrong_layout`."""
    if not directory.is_dir():
        return "no such folder"
    names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) + more) or "an empty folder"


def fault(media: Media) -> str:
    """What is wrong with a medium's file as it was downloaded; empty if it is there and has content."""
    place = media.source
    if not isinstance(place, Path):
        return ""
    if not place.is_file():
        return "no such file"
    size = place.stat().st_size
    if not size:
        return "an empty file"
    # Git without LFS leaves a few lines of text in place of a large file.
    if size < POINTER_BYTES and place.read_bytes().startswith(POINTER):
        return "a pointer of Git LFS in place of the file"
    return ""


def present(items: Sequence[Item], benchmark: str, *, skip: bool) -> list[Item]:
    """The questions whose media files all exist; the error of a wrong layout if one is missing and not skipped."""
    absent: dict[str, tuple[Media, str]] = {}
    for item in items:
        for part in item.parts:
            if isinstance(part, Media) and (wrong := fault(part)):
                absent[item.id] = part, wrong
    for name, (part, wrong) in absent.items():
        if not skip:
            found = f"{wrong} ({len(absent)} of {len(items)} questions lack one; --skip-missing leaves them out)"
            raise wrong_layout(Path(str(part.source)), benchmark, f"the {part.kind} of {name}", found)
    return [item for item in items if item.id not in absent]


def read_json(place: Path, benchmark: str, kind: type[T]) -> T:
    """The content of a JSON file that holds a `kind`; the error of a wrong layout if it is missing or differs."""
    if not place.is_file():
        raise wrong_layout(place.parent, benchmark, place.name, listing(place.parent))
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong_layout(place, benchmark, "JSON", str(error)) from error
    if not isinstance(content, kind):
        raise wrong_layout(place, benchmark, f"a {kind.__name__}", f"a {type(content).__name__}")
    return content


def check_cells(row: Mapping[str, Any], kinds: Mapping[str, type], place: Path, benchmark: str, name: str) -> None:
    """Raise the error of a wrong layout for a value of another kind, or for none; a `list` is one of texts.

    A missing question would be asked as "None".
    """
    for column, kind in kinds.items():
        value = row[column]
        entries = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(entry, str) for entry in entries):
            raise wrong_layout(place, benchmark, f"{_KINDS[kind]} in {column} of {name}", repr(value)[:100])


def parquet_rows(
    files: Sequence[Path], benchmark: str, columns: Sequence[str], kinds: Mapping[str, type]
) -> Iterator[dict[str, Any]]:
    """Rows of parquet files that must have `columns`, and values of these `kinds`; else the error of a wrong layout."""
    import pyarrow
    import pyarrow.parquet as parquet

    for path in files:
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise wrong_layout(path, benchmark, "a parquet file", str(error).splitlines()[0]) from error
        present = file.schema_arrow.names
        missing = [column for column in columns if column not in present]
        if missing:
            raise wrong_layout(path, benchmark, f"columns {', '.join(columns)}", f"columns {', '.join(present)}")
        try:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    check_cells(row, kinds, path, benchmark, f"row {number}")
                    yield row
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise wrong_layout(path, benchmark, "whole pages", str(error).splitlines()[0]) from error


def embedded_image(value: Mapping[str, Any] | None, benchmark: str, owner: str) -> Media | None:
    """The image of a parquet cell, stored as {"bytes", "path"}; None for an empty cell."""
    if value is None:
        return None
    data = value.get("bytes") if isinstance(value, Mapping) else None
    if not isinstance(data, bytes):
        raise wrong_layout(Path(owner), benchmark, "an image with its bytes", f"{type(value).__name__} without bytes")
    return Media("image", "jpeg" if data[:2] == b"\xff\xd8" else "png", data)
