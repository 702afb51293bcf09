"""The handling of the calibrating process's events, and a whole run of the command on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.calibrate.__main__ import main
from benchmarks.calibrate.memory import MemoryWatch, Peak
from benchmarks.calibrate.report import markdown
from benchmarks.calibrate.serve import describe
from benchmarks.calibrate.summary import summarise
from benchmarks.calibrate.timing.bound import Decoder
from benchmarks.calibrate.timing.measure import Measured, take
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError

REPOSITORY = Path(__file__).parents[4]


def after(measured: Measured, *blocks: tuple[int, float], start: float, end: float | None = None) -> Measured:
    """Enter a run's events: (block, time when it was done), and when it finished."""
    before, fresh = start, True
    for index, time in blocks:
        event = {"event": "block", "index": index, "time": time, "loss": 0.1, "cpu": 3.0}
        entered = take(measured, event, before, fresh, Peak(2, 1))
        before, fresh = time, fresh and not entered
    if end is not None:
        last = {"event": "end", "time": end, "finished": True, "peak": 9, "profile": {}}
        assert not take(measured, last, before, fresh, Peak())
    return measured


def test_a_whole_run_adds_up_to_its_own_time() -> None:
    measured = after(Measured(), (0, 30.0), (1, 40.0), (2, 52.0), start=0.0, end=57.0)
    assert measured.typical_block() == 11.0
    assert measured.setup() == 19.0
    assert measured.total(3) == (57.0, False)


def test_a_run_that_was_stopped_is_extrapolated() -> None:
    measured = after(Measured(), (0, 30.0), (1, 40.0), start=0.0)
    assert measured.total(36) == (20.0 + 36 * 10.0, True)


def test_a_run_that_was_continued_counts_no_reading_twice() -> None:
    measured = after(Measured(), (0, 30.0), (1, 40.0), start=0.0)
    # Two blocks are named again; block 2 is the first to be worked on, after the model was read.
    after(measured, (0, 101.0), (1, 101.5), (2, 160.0), (3, 171.0), start=100.0, end=173.0)
    assert [measured.blocks[number]["seconds"] for number in range(4)] == [None, 10.0, None, 11.0]
    total, extrapolated = measured.total(4)
    assert not extrapolated
    # Block 2's own time is not known: a typical one, 10.5 s, stands for it.
    assert total == pytest.approx(30.0 + 10.0 + 10.5 + 11.0 + 2.0)


def test_one_block_alone_says_nothing_of_the_whole() -> None:
    measured = after(Measured(), (0, 30.0), start=0.0)
    assert measured.total(36) == (None, True)
    decoder = Decoder(8, 16, 2, 1, 36)
    take(measured, {"event": "start", "time": 0.0, "rates": {"bfloat16": 1e9, "float32": 2e9}}, 0.0, True, Peak())
    result = summarise(measured, decoder, 36, 2, 5, Recipe().model_dump(mode="json"))
    assert result["bounds"]["bfloat16"]["total_ratio"] is None
    described = {"layout": "3B", "command": "", "machine": "", "contended": False, "cores": 2, "load": 0.0}
    described |= {"model": "", "samples": 2, "tokens": 5, "media": 0, "recipe": Recipe().model_dump(mode="json")}
    assert "not known" in markdown(described | result, "x")


def test_memory_of_a_child_is_seen() -> None:
    script = "import sys; held = b'x' * 200_000_000; print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    with MemoryWatch(child.pid) as watch:
        child.stdout.readline()
        while watch.peak.anonymous < 200_000_000 and psutil.pid_exists(child.pid):
            watch._stopped.wait(0.05)
        child.stdin.close()
        child.wait()
    assert 200_000_000 < watch.peak.anonymous <= watch.peak.resident < 400_000_000


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments])
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(REPOSITORY)
    main()


def test_the_command_calibrates_and_says_what_it_took(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, results = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    (work / "tiny").symlink_to(model)
    sizes = ("--layout", "tiny", "--samples", "3", "--tokens", "320", "--media", "1", "--cores", "1")
    run(monkeypatch, "--work", str(work), "--results", str(results), *sizes)
    result = json.loads((results / "calibrate.json").read_text())
    assert result["finished"] and not result["extrapolated"]
    assert list(result["blocks"]) == ["0", "1"]
    assert 0 < result["blocks"]["1"]["seconds"] < result["total_seconds"]
    assert result["blocks"]["0"]["cpu"] is None and 0 < result["blocks"]["1"]["cpu"] < 10 * result["total_seconds"]
    assert 0 < result["anonymous_peak"] < result["peak"]
    for bound in result["bounds"].values():
        assert bound["block_ratio"] == pytest.approx(result["block_seconds"] / bound["block"])
    assert any(row["function"].startswith("calibration.") for row in result["profile"]["cumulative"])
    report = (results / "calibrate.md").read_text()
    assert "all 2 blocks measured" in report and "extrapolated" not in report
    served = describe(work / "tiny-MorphoQuant")
    assert served["model"]["layout"] == "tiny" and served["settings"]["rounding"] == "compensated"
    # Measured times are kept.
    kept = (results / "calibrate.json").stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("calibrates again"))
    run(monkeypatch, "--work", str(work), "--results", str(results), *sizes)
    assert (results / "calibrate.json").stat().st_mtime_ns > kept


@pytest.mark.full
def test_a_decoder_with_experts_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--layout", "tiny-experts", "--samples", "3", "--tokens", "64", "--cores", "1")
    run(monkeypatch, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), *sizes)
    result = json.loads((tmp_path / "results" / "calibrate.json").read_text())
    assert result["finished"] and result["media"] == 0 and list(result["blocks"]) == ["0", "1"]


def test_what_cannot_be_done_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: layout '4B' is not known; use one of 3B, 7B, tiny, 30B"):
        run(monkeypatch, "generate", "--layout", "4B", "--output", str(tmp_path / "model"))
    with pytest.raises(SystemExit, match=r"^error: --media 1: the layout 30B-A3B takes text alone; leave --media out"):
        run(monkeypatch, "--layout", "30B-A3B", "--media", "1", "--work", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^error: --set dtype: write SETTING=VALUE"):
        run(monkeypatch, "--set", "dtype")
    with pytest.raises(SystemExit, match=r"^error: --set ignore=\*\.down_proj: the value is not YAML"):
        run(monkeypatch, "--set", "ignore=*.down_proj")
    with pytest.raises(MorphoQuantError, match=r"no morphoquant_calibration\.json"):
        describe(tmp_path)
