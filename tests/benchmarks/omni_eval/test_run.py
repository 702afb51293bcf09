"""Runs against a small HTTP server: several requests at a time, a server that goes away, a run that goes on."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.omni_eval.__main__ import main
from tests.benchmarks.common.questions.miniature import WRITERS
from tests.benchmarks.common.questions.stub import serving


def run(name: str, directory: Path, url: str, output: Path, *more: str) -> dict[str, Any]:
    main([name, str(directory), "--base-url", url, "--output", str(output), "--retries", "0", *more])
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def refusal(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_run_and_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    with serving(together=threading.Barrier(2)) as (url, asked):
        summary = run("scienceqa", data, url, tmp_path / "out", "--concurrency", "2")
    assert len(asked) == 4
    assert all(body["model"] == "tiny" and body["temperature"] == 0 for body in asked)
    assert (summary["benchmark"], summary["model"], summary["questions"]) == ("ScienceQA", "tiny", 4)
    assert summary["all"]["accuracy"] == 0.5
    assert {name: entry["accuracy"] for name, entry in summary["by"]["modality"].items()} == {
        "text": 0.0,
        "text+image": 1.0,
    }
    printed = capsys.readouterr().out
    assert "ScienceQA: accuracy with 95% interval" in printed and "social science" in printed


def test_a_server_that_stops_answering_ends_the_run_which_then_goes_on(tmp_path: Path) -> None:
    data, output = WRITERS["scienceqa"](tmp_path / "data"), tmp_path / "out"
    with serving(answers=3) as (url, _):
        message = refusal("scienceqa", data, url, output, "--concurrency", "1")
    assert "stopped answering (Error code: 500" in message
    assert message.endswith("; 3 of 4 questions are answered and kept: run the same command again to go on")
    assert not (output / "summary.json").exists()
    assert len((output / "answers.jsonl").read_text().splitlines()) == 3
    # A killed run leaves half a line.
    with (output / "answers.jsonl").open("a") as file:
        file.write('{"id": "test-3", "resp')
    with serving() as (url, asked):
        summary = run("scienceqa", data, url, output)
    assert len(asked) == 1, "what was answered is not asked again"
    assert summary["all"]["answered"] == 4 and summary["all"]["accuracy"] == 0.5


def test_no_server_at_all(tmp_path: Path) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    with serving() as (url, _):
        pass
    assert "no OpenAI server answers" in refusal("scienceqa", data, url, tmp_path / "out")
    message = refusal("scienceqa", data, url, tmp_path / "out", "--model", "tiny")
    assert "; 0 of 4 questions are answered and kept" in message


def test_a_refused_request_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    with serving(refuse="Question 1?") as (url, _):
        summary = run("scienceqa", data, url, tmp_path / "out")
    assert (summary["all"]["refused"], summary["all"]["answered"]) == (1, 4)
    notes = [json.loads(line).get("note", "") for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert sum("prompt too long" in note for note in notes) == 1


def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    data, output = WRITERS["scienceqa"](tmp_path / "data"), tmp_path / "out"
    with serving() as (url, _):
        run("scienceqa", data, url, output)
        message = refusal("scienceqa", data, url, output, "--model", "other")
        assert "holds a run with another model ('tiny'); choose another --output" in message
        assert "another questions" in refusal("scienceqa", data, url, output, "--limit", "2")


def judged(text: str) -> str:
    """A judge that likes the reference better, wherever it stands, and has no numbers for one question."""
    if "heard in 3?" in text:
        return "Both are fine."
    first = text.index("[The Start of Assistant 1s Answer]") + len("[The Start of Assistant 1s Answer]") + 1
    return "8 4\n" if text[first:].startswith("A rising tone.") else "5 9"


def test_a_judge_scores_open_answers_in_both_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = WRITERS["air-bench-chat"](tmp_path / "data")
    with (
        serving(say=lambda text: "A {tone}.", refuse="heard in 4?") as (url, asked),
        serving(say=judged) as (judge, questions),
    ):
        summary = run("air-bench-chat", data, url, tmp_path / "out", "--judge-url", judge)
    assert len(asked) == 7 and asked[0]["max_tokens"] == 1024
    assert {body["messages"][0]["content"][-1]["text"] for body in asked} == {
        f"What is heard in {number}?" for number in range(8) if number != 4
    }
    assert len(questions) == 14
    found = summary["all"]
    assert (found["judged"], found["unparsed"], found["refused"]) == (6, 1, 1)
    assert (found["score"], found["reference"]) == (4.5, 8.5)
    assert summary["judge"] == "tiny" and summary["by"]["subject"]["music"]["refused"] == 1
    assert "AIR-Bench Chat: scores of 10 with 95% interval" in capsys.readouterr().out


def test_a_judge_that_stops_answering_ends_the_run_which_then_goes_on(tmp_path: Path) -> None:
    data, output = WRITERS["air-bench-chat"](tmp_path / "data"), tmp_path / "out"
    with serving() as (url, asked):
        with serving(say=judged, answers=5) as (judge, _):
            message = refusal("air-bench-chat", data, url, output, "--judge-url", judge, "--concurrency", "1")
        assert "; 5 of 16 questions are answered and kept: run the same command again" in message
        assert not (output / "summary.json").exists()
        with serving(say=judged) as (judge, questions):
            summary = run("air-bench-chat", data, url, output, "--judge-url", judge)
    assert (len(asked), len(questions)) == (8, 11)
    assert summary["all"]["judged"] == 7


def test_questions_without_their_media_are_left_out_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = WRITERS["video-mme"](tmp_path / "data")
    (data / "data" / "dEf_2.mp4").unlink()
    with serving() as (url, asked):
        message = refusal("video-mme", data, url, tmp_path / "out")
        assert "dEf_2.mp4: not the layout of Video-MME: expected the video of 002-1; found no such file" in message
        assert "(1 of 3 questions lack one; --skip-missing leaves them out)" in message
        summary = run("video-mme", data, url, tmp_path / "out", "--skip-missing")
    assert len(asked) == 2
    assert (summary["questions"], summary["without_media"]) == (2, 1)
    assert "media are missing: 1 questions" in capsys.readouterr().out


def test_options_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ("http://127.0.0.1:1/v1", tmp_path / "out")
    assert "name its server with --judge-url" in refusal("air-bench-chat", tmp_path, *nowhere)
    assert "no judge scores mmmu" in refusal("mmmu", tmp_path, *nowhere, "--judge-url", "http://x")
    assert "mmmu has none; leave it out" in refusal("mmmu", tmp_path, *nowhere, "--subtitles", "all")
    with pytest.raises(SystemExit):
        run("video-mme", tmp_path, *nowhere, "--subtitles", "0")
    assert "give one above 0, or all" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_response_that_is_not_parsed_is_counted_as_such(tmp_path: Path) -> None:
    data = WRITERS["video-mme"](tmp_path / "data")
    with serving(say=lambda text: "Cannot tell") as (url, _):
        summary = run("video-mme", data, url, tmp_path / "out")
    assert (summary["all"]["unparsed"], summary["all"]["wrong"], summary["all"]["accuracy"]) == (3, 0, 0.0)
