"""benchmarks.paper as a user runs it, on a tiny omni model: killed once while it asks, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.paper.published import write_published
from tests.harness import REPOSITORY

pytestmark = pytest.mark.full

SERVE = "--dtype=float32 --max-model-len=2048 --max-num-seqs=4 --enforce-eager"


def start(directory: Path, model: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    places = ["--model", str(model), "--data", str(directory / "data"), "--output", str(directory / "out")]
    settings = ["--max-tokens", "4", "--concurrency", "1", "--serve-arguments", SERVE]
    settings += ["--calibrate-arguments", "--sample-tokens 256"]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.paper", *places, *settings],
        cwd=REPOSITORY,
        stdout=(directory / "stdout").open("ab"),
        stderr=(directory / "stderr").open("ab"),
        start_new_session=True,
    )


def servers(directory: Path) -> list[int]:
    """Processes whose command line names the output directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory / "out" / "checkpoint").encode() in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, (path.parents[3] / "stderr").read_text()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def test_a_killed_run_goes_on_and_prints_the_table(tmp_path: Path, omni_source: Path) -> None:
    write_published(tmp_path / "data")
    answers = tmp_path / "out" / "rows" / "morphoquant" / "scienceqa" / "answers.jsonl"
    first = start(tmp_path, omni_source)
    try:
        wait_for(answers, first, 900)
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait(30) == -signal.SIGKILL
        # Its server ends by itself.
        deadline = time.monotonic() + 60
        while servers(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert servers(tmp_path) == []
    finally:
        first.kill()
    kept = answers.read_bytes()
    assert kept and not (tmp_path / "out" / "table.json").exists()
    calibrated = (tmp_path / "out" / "checkpoint" / "config.json").stat().st_mtime_ns
    sixteen_bit = (tmp_path / "out" / "rows" / "16-bit" / "serve.log").stat().st_mtime_ns

    again = start(tmp_path, omni_source)
    assert again.wait(900) == 0, (tmp_path / "stderr").read_text()
    # Whole lines of the killed run stand as they were; nothing that was finished was done again.
    whole = kept[: kept.rfind(b"\n") + 1]
    assert answers.read_bytes().startswith(whole)
    assert (tmp_path / "out" / "checkpoint" / "config.json").stat().st_mtime_ns == calibrated
    assert (tmp_path / "out" / "rows" / "16-bit" / "serve.log").stat().st_mtime_ns == sixteen_bit

    result = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["16 bit, vLLM", "MorphoQuant for vLLM"]
    for row in result["rows"]:
        answered = {name: found["all"]["answered"] for name, found in row["benchmarks"].items()}
        # A video and a sound are held out; two questions are about that video.
        assert answered == {"scienceqa": 4, "mmmu": 3, "video-mme": 1, "air-bench": 2}
        assert all(found["all"]["refused"] == 0 for found in row["benchmarks"].values())
    own = result["rows"][1]
    assert 0 < own["escape_rate"] < 0.1 and own["calibration_seconds"] > 0
    assert 0 < own["bytes"] < result["rows"][0]["bytes"]
    printed = (tmp_path / "stdout").read_text()
    assert "| MorphoQuant | 4/4 | 76.63 | 45.11 | 54.33 | 65.09 | arXiv 2606.04349, Table |" in printed
    assert "| MorphoQuant for vLLM | 4/4 |" in printed and "time: calibration is done" in printed
