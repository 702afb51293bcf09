"""benchmarks.omni_eval against a served omni checkpoint: every benchmark, its media included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.server import Server
from benchmarks.omni_eval.__main__ import main
from tests.benchmarks.common.questions.miniature import WRITERS
from tests.benchmarks.common.questions.stub import serving

pytestmark = pytest.mark.slow


def run(server: Server, name: str, data: Path, output: Path, *more: str) -> dict[str, Any]:
    where = ("--base-url", server.openai_url, "--output", str(output))
    main([name, str(data), *where, "--max-tokens", "4", "--concurrency", "2", *more])
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def test_open_answers_are_judged(server: Server, tmp_path: Path) -> None:
    """A stub is the judge: a random model has no scores to give."""
    data = WRITERS["air-bench-chat"](tmp_path / "data")
    with serving(say=lambda text: "8 5") as (judge, asked):
        summary = run(server, "air-bench-chat", data, tmp_path / "out", "--judge-url", judge)
    assert len(asked) == 16
    # 5 if the response comes second, 8 if it comes first.
    assert (summary["all"]["judged"], summary["all"]["refused"], summary["all"]["score"]) == (8, 0, 6.5)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "air-bench-chat"])
def test_every_question_is_answered(server: Server, tmp_path: Path, name: str) -> None:
    data = WRITERS[name](tmp_path / "data")
    summary = run(server, name, data, tmp_path / "out", *(("--subtitles", "4") if name == "video-mme" else ()))
    expected = {"scienceqa": 4, "mmmu": 3, "video-mme": 3, "air-bench": 3}[name]
    found = summary["all"]
    assert (summary["questions"], found["answered"], found["refused"]) == (expected, expected, 0)
    # A random model: its words are not letters, and must count as not parsed.
    assert found["right"] + found["wrong"] + found["unparsed"] == expected
    assert sum(entry["answered"] for entry in summary["by"]["subject"].values()) == expected
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert any(answer["response"] for answer in answers)
