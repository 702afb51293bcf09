"""Runs one part as a process of its own, so that its end does not stop the rest, and reads what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from benchmarks.gpu.parts import Part

# Characters of a failed part's output that are kept.
TAIL = 2000


def command_of(part: Part, work: Path) -> list[str]:
    """The command line of a part whose files lie in `work`."""
    return [word.format(work=work, python=sys.executable) for word in part.command]


def run(part: Part, work: Path) -> dict[str, Any]:
    """Run a part; its state, seconds, result, and the end of its output unless it passed.

    The state is passed, failed, stopped, or skipped if none of its tests ran.
    """
    work.mkdir(parents=True, exist_ok=True)
    # A result of an earlier run must not pass for this one's.
    for path in work.glob(part.result):
        path.unlink()
    log = work / "log.txt"
    started = time.monotonic()
    with log.open("wb") as output:
        status = _ended(command_of(part, work), output, part.limit)
    state = f"stopped after {part.limit} s" if status is None else "failed" if status else "passed"
    entry: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - started, 1)}
    entry["result"] = read(part, work)
    if state == "passed" and entry["result"] is None:
        entry["state"] = "failed: it left no result"
    elif state == "passed" and Path(part.result).suffix == ".xml" and not entry["result"]["passed"]:
        entry["state"] = "skipped: no test ran"
    if entry["state"] != "passed":
        entry["output"] = log.read_text(errors="replace")[-TAIL:]
    return entry


def _ended(command: Sequence[str], output: IO[bytes], limit: float) -> int | None:
    """The exit status of a command, None if it ran past `limit` seconds; no process that it started is left."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # A worker would hold the GPU while the next part is timed.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(part: Part, work: Path) -> dict[str, Any] | None:
    """What a part left behind; None if it is missing or cut off."""
    for path in sorted(work.glob(part.result)):
        try:
            if path.suffix == ".xml":
                return counts(path)
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        except (ValueError, ElementTree.ParseError):
            continue
    return None


def counts(path: Path) -> dict[str, Any]:
    """Tests of pytest's JUnit file by outcome, with the names of those that failed and the reasons of skips."""
    outcomes: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"].append(case.get("name"))
        elif skip is not None:
            reason = skip.get("message", "")
            outcomes["skipped"][reason] = outcomes["skipped"].get(reason, 0) + 1
        else:
            outcomes["passed"] += 1
    return outcomes
