"""Parts as processes: results, failures, time limits; the merged result and its page."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks.gpu.__main__ as command
from benchmarks.gpu.parts import Part
from benchmarks.gpu.report import markdown
from benchmarks.gpu.run import counts, run

ROWS = '{"rows": [{"layer": "o", "M": 1, "method": "bf16", "us": 20}, {"layer": "o", "M": 1, "method": "w", "us": 8}]}'
JUNIT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>
<testcase name="c"><skipped message="no GPU is at hand"/></testcase></testsuite></testsuites>"""


def test_a_part_that_is_stopped_leaves_no_worker(tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    assert run(part("p", code, limit=3), tmp_path)["state"] == "stopped after 3 s"
    pid = int((tmp_path / "pid").read_text())
    # Death takes a moment; a killed process then stays as a zombie until init reaps it.
    end = time.monotonic() + 30
    while time.monotonic() < end and alive(pid):
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs: it is there, and no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_a_part_whose_tests_are_all_skipped_has_not_passed(tmp_path: Path) -> None:
    xml = '<testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite>'
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'tests.xml')!r}).write_text({xml!r})"
    entry = run(part("p", code, result="tests.xml"), tmp_path)
    assert entry["state"] == "skipped: no test ran" and entry["result"]["skipped"] == {"no GPU": 1}


def part(name: str, code: str, result: str = "result.json", limit: int = 60) -> Part:
    return Part(
        name, "a test", ("{python}", "-c", code.replace("{", "{{").replace("}", "}}")), limit, True, False, result
    )


def leaves(path: Path, text: str, status: int = 0) -> str:
    return f"import sys; open({str(path)!r}, 'w').write({text!r}); print('bye'); sys.exit({status})"


def test_a_part_that_passes_gives_its_result(tmp_path: Path) -> None:
    entry = run(part("p", leaves(tmp_path / "result.json", ROWS)), tmp_path)
    assert entry["state"] == "passed" and entry["result"]["rows"][1]["us"] == 8
    assert "output" not in entry


def test_a_part_that_fails_keeps_the_end_of_its_output(tmp_path: Path) -> None:
    entry = run(part("p", leaves(tmp_path / "result.json", ROWS, 3)), tmp_path)
    assert entry["state"] == "failed" and entry["output"].strip() == "bye"


def test_a_part_that_leaves_nothing_or_a_torn_file_has_failed(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(ROWS)  # of an earlier run
    assert run(part("p", "pass"), tmp_path)["state"] == "failed: it left no result"
    assert run(part("p", leaves(tmp_path / "result.json", ROWS[:20])), tmp_path)["state"] == "failed: it left no result"


def test_a_part_that_hangs_is_stopped(tmp_path: Path) -> None:
    entry = run(part("p", "import time; time.sleep(60)", limit=1), tmp_path)
    assert entry["state"] == "stopped after 1 s" and entry["seconds"] < 30


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    assert counts(tmp_path / "tests.xml") == {"passed": 1, "failed": ["b"], "skipped": {"no GPU is at hand": 1}}


def run_on_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: list[Part], refused: str = ""
) -> tuple[int, str]:
    monkeypatch.setattr(command, "device", lambda: "A GPU/80 GB")
    monkeypatch.setattr(command, "why_no_engines", lambda: refused)
    arguments = command.parser().parse_args(["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")])
    bad = command.run_all(parts, arguments)
    return bad, (tmp_path / "results" / "A-GPU-80-GB.md").read_text()


def test_a_failed_part_does_not_stop_the_rest_and_a_later_run_replaces_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "work" / "second").mkdir(parents=True)
    second = part("second", leaves(tmp_path / "work" / "second" / "result.json", ROWS))
    bad, page = run_on_a_device(monkeypatch, tmp_path, [part("first", "raise SystemExit('it broke')"), second])
    assert bad == 1
    assert "| first |  | failed |" in page and "it broke" in page
    assert "| o | 1 | 20.0 (1.00x) | 8.0 (2.50x) |" in page
    first = part("first", leaves(tmp_path / "work" / "first" / "result.json", ROWS))
    bad, page = run_on_a_device(monkeypatch, tmp_path, [first])
    assert bad == 0
    assert "it broke" not in page and page.count("8.0 (2.50x)") == 2


def test_parts_that_need_vllm_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Part("engine", "a test", ("{python}", "-c", "raise SystemExit(9)"), 60, True, True, "tests.xml")
    bad, page = run_on_a_device(monkeypatch, tmp_path, [engine], "vLLM is a build for CPUs")
    assert bad == 1 and "| not run: vLLM is a build for CPUs |" in page


def test_the_page_counts_tests() -> None:
    entry = {
        "state": "failed",
        "seconds": 3.0,
        "when": "2026-11-27",
        "result": {"passed": 5, "failed": ["b"], "skipped": {}},
    }
    page = markdown({"device": "D", "versions": {"torch": "2.13"}, "parts": {"kernels": entry}})
    assert "failed: 5 passed, 1 failed, 0 skipped | 3 | 2026-11-27 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_without_a_gpu_it_ends_in_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path / "results")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [text[:26] for text in done.stderr.splitlines()] == ["error: no GPU is at hand: t"[:26]]
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_cpu_build_of_vllm_is_named() -> None:
    assert command.why_no_engines().startswith("vLLM ")
