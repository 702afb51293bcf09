"""Responses on disk: whatever cuts a run short, whole lines are kept and nothing else is."""

import json
from pathlib import Path

import pytest

from benchmarks.common.questions.answers import Answers, read_answers
from morphoquant_vllm.errors import MorphoQuantError

RUN = {"benchmark": "X", "max_tokens": 4}


def lines(directory: Path) -> list[bytes]:
    return (directory / "answers.jsonl").read_bytes().splitlines()


def test_answers_are_on_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(len((tmp_path / "answers.jsonl").read_bytes())))
    answers = Answers(tmp_path, RUN)
    # run.json is written before, without a sync of its own.
    answers.add("1", "A")
    assert synced == [(tmp_path / "answers.jsonl").stat().st_size]


def test_a_line_that_was_cut_is_dropped_and_the_others_stay_byte_for_byte(tmp_path: Path) -> None:
    answers = Answers(tmp_path, RUN)
    answers.add("1", "A\nreally")
    answers.add("2", None, "too long")
    kept = (tmp_path / "answers.jsonl").read_bytes()
    for cut in (b"{", b'{"id": "3", "response": "B"', b'{"id": "3", "response": "\xc3'):
        (tmp_path / "answers.jsonl").write_bytes(kept + cut)
        again = Answers(tmp_path, RUN)
        assert again.responses == {"1": "A\nreally", "2": None}
        assert (tmp_path / "answers.jsonl").read_bytes() == kept
    again.add("3", "B")
    assert len(lines(tmp_path)) == 3 and Answers(tmp_path, RUN).responses["3"] == "B"


def test_the_time_of_asking_is_the_sum_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    answers = Answers(tmp_path, RUN)
    now[0] = 102.0
    answers.add("1", "A")
    # A day passes between two runs.
    now[0] = 90000.0
    again = Answers(tmp_path, RUN)
    now[0] = 90003.0
    again.add("2", "B")
    assert again.seconds == read_answers(tmp_path)[1] == 5.0


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    Answers(tmp_path, RUN).add("1", "A")
    for damaged in ("nonsense", json.dumps({"id": "2"}), json.dumps([])):
        (tmp_path / "answers.jsonl").write_text(f"{damaged}\n")
        with pytest.raises(MorphoQuantError, match=r"answers.jsonl: line 1 is damaged; remove that line"):
            Answers(tmp_path, RUN)


def test_answers_of_another_run_are_refused(tmp_path: Path) -> None:
    Answers(tmp_path, RUN)
    with pytest.raises(MorphoQuantError, match=r"holds a run with another max_tokens \(4\)"):
        Answers(tmp_path, {**RUN, "max_tokens": 5})
