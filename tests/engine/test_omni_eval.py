"""benchmarks.omni_eval against a served omni checkpoint: every benchmark, its media included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.omni_eval.__main__ import main
from benchmarks.server import Server
from tests.benchmarks.omni_eval.miniature import WRITERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", list(WRITERS))
def test_every_question_is_answered(server: Server, tmp_path: Path, name: str) -> None:
    data = WRITERS[name](tmp_path / "data")
    where = ("--base-url", server.openai_url, "--output", str(tmp_path / "out"))
    main([name, str(data), *where, "--max-tokens", "4", "--concurrency", "2"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = {"scienceqa": 4, "mmmu": 3, "video-mme": 3, "air-bench": 3}[name]
    found = summary["all"]
    assert (summary["questions"], found["answered"], found["refused"]) == (expected, expected, 0)
    # A random model: its words are no letters, and must be counted as what they are.
    assert found["right"] + found["wrong"] + found["unparsed"] == expected
    assert sum(entry["answered"] for entry in summary["by"]["subject"].values()) == expected
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert any(answer["response"] for answer in answers)
