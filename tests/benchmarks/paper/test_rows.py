"""A row that is asked, cut off and asked again, against a small HTTP server."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.paper import rows
from benchmarks.paper.prompts import SYSTEM
from morphoquant_vllm.errors import MorphoQuantError
from tests.benchmarks.common.questions.stub import serving
from tests.benchmarks.paper.published import options, write_published
from tests.tiny_conversations import write_video

CONSOLE = Console(file=io.StringIO())
ONE_AT_A_TIME = ("--concurrency", "1")


def test_a_row_goes_on_where_its_server_died(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    folder = tmp_path / "row"
    with serving(answers=5) as (url, _), pytest.raises(MorphoQuantError, match="1 of 3 questions are answered"):
        rows.ask(rows.Row("x", folder, url=url), options(tmp_path, *ONE_AT_A_TIME), {}, CONSOLE)
    assert (folder / "scienceqa" / "summary.json").is_file() and not (folder / "mmmu" / "summary.json").exists()
    # A killed process leaves half a line.
    with (folder / "mmmu" / "answers.jsonl").open("a") as file:
        file.write('{"id": "validation_Art_2", "respo')
    with serving() as (url, asked):
        found = rows.ask(rows.Row("x", folder, url=url), options(tmp_path, *ONE_AT_A_TIME), {}, CONSOLE)
    assert len(asked) == 2 + 3 + 3, "what was answered is not asked again"
    assert {name: one["all"]["answered"] for name, one in found.items()} == {
        "scienceqa": 4,
        "mmmu": 3,
        "video-mme": 3,
        "air-bench": 3,
    }
    # The stub says B.
    assert found["scienceqa"]["all"]["right"] == 2 and found["air-bench"]["all"]["right"] == 3


def test_a_row_that_is_complete_needs_no_server(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    with serving() as (url, _):
        first = rows.ask(rows.Row("x", tmp_path / "row", url=url), options(tmp_path), {}, CONSOLE)
    gone = rows.Row("x", tmp_path / "row", tmp_path / "no model")
    assert rows.ask(gone, options(tmp_path), {}, CONSOLE) == first


def test_held_out_media_are_left_out_and_counted(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    held = {"video-mme": ["data/aBc-1.mp4"]}
    with serving() as (url, asked):
        found = rows.ask(
            rows.Row("x", tmp_path / "row", url=url), options(tmp_path, "--benchmarks", "video-mme"), held, CONSOLE
        )
    assert len(asked) == 1 and list(found) == ["video-mme"]
    assert (found["video-mme"]["questions"], found["video-mme"]["held_out_media"]) == (1, 1)


def test_a_server_that_does_not_start_is_one_line_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_published(tmp_path / "data")
    (tmp_path / "vllm").write_text("#!/bin/sh\necho no GPU\nexit 3\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    row = rows.Row("16 bit", tmp_path / "row", tmp_path / "model")
    with pytest.raises(MorphoQuantError) as caught:
        rows.ask(row, options(tmp_path), {}, CONSOLE)
    log = tmp_path / "row" / "serve.log"
    assert str(caught.value) == f"16 bit: vllm serve exited with 3; its log {log} says why"
    assert log.read_text() == "no GPU\n"


def test_rates_are_those_of_all_rows_answers(tmp_path: Path) -> None:
    for row, seconds in (("a", (1.0, 2.0)), ("b", (6.0,))):
        place = tmp_path / row / "mmmu" / "answers.jsonl"
        place.parent.mkdir(parents=True)
        lines = [{"id": str(number), "response": "A", "seconds": took} for number, took in enumerate(seconds)]
        place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [tmp_path / name for name in ("a", "b", "none")]
    assert rows.measured_rates(folders, ["mmmu", "scienceqa"]) == {"mmmu": 3.0}


def test_the_server_takes_as_many_frames_of_a_video_as_the_papers_code(tmp_path: Path) -> None:
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    (argument,) = (one for one in rows.SERVE_ARGUMENTS if one.startswith("--media-io-kwargs="))
    settings = json.loads(argument.partition("=")[2])["video"]
    video = tmp_path / "long.mp4"
    write_video(video, 0, frames=90)
    frames, _ = VideoMediaIO(ImageMediaIO(), **settings).load_bytes(video.read_bytes())
    assert len(frames) == rows.FRAMES == 32


def test_the_system_prompt_is_sent_and_kept(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    chosen = options(tmp_path, "--prompts", "paper", "--benchmarks", "air-bench")
    with serving() as (url, asked):
        found = rows.ask(rows.Row("x", tmp_path / "row", url=url), chosen, {}, CONSOLE)
    assert asked[0]["messages"][0]["content"] == SYSTEM and asked[0]["max_tokens"] == 256
    assert found["air-bench"]["system"] == SYSTEM
    assert found["air-bench"]["paper_rule"] == found["air-bench"]["all"]
