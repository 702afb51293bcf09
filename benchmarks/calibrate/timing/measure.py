"""Runs a calibration in a separate process and times its blocks; keeps the measured times."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.calibrate.memory import MemoryWatch, Peak
from benchmarks.calibrate.timing.worker import Job
from benchmarks.common.files import digest, write_atomically
from morphoquant_vllm.errors import MorphoQuantError

STOP_SECONDS = 30


@dataclass
class Measured:
    """One calibration, perhaps of several runs: figures of each block by its number, and of the whole."""

    # Seconds (None: other work stood before the block in its run), and of all cores together, which a busy machine
    # changes less; and the peak of memory while it was worked on.
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)
    # Seconds from the start to the end of the first block of an uninterrupted first run.
    to_first_block: float | None = None
    # From the last block to the end; None if the run was stopped after some blocks.
    after_last_block: float | None = None
    finished: bool = False
    # Peak memory of the largest process, by the operating system's count.
    peak: int = 0
    # Peak of the memory that torch kept on the GPU; 0 on a CPU.
    gpu_peak: int = 0
    profile: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # FLOP/s of products by dtype, on the same cores: the best of all runs.
    rates: dict[str, float] = field(default_factory=dict)

    def typical_block(self) -> float | None:
        """Median seconds of the blocks before which nothing else was done."""
        seconds = [block["seconds"] for block in self.blocks.values() if block["seconds"] is not None]
        return statistics.median(seconds) if seconds else None

    def setup(self) -> float | None:
        """Seconds before the first block: the time to its end, minus that of a typical block."""
        typical = self.typical_block()
        if self.to_first_block is None or typical is None:
            return None
        return max(0.0, self.to_first_block - typical)

    def total(self, count: int) -> tuple[float | None, bool]:
        """Seconds of a calibration of `count` blocks, and whether they are extrapolated from fewer."""
        typical, setup = self.typical_block(), self.setup()
        if typical is None or setup is None:
            return None, True
        complete = self.finished and len(self.blocks) == count
        blocks = (
            [self.blocks[number]["seconds"] or typical for number in range(count)] if complete else [typical] * count
        )
        return setup + sum(blocks) + (self.after_last_block or 0.0), not complete


def measure(job: Job, work: Path, progress: Callable[[str], None] = lambda line: None) -> Measured:
    """Run the calibration `job` and time it; a resumed run adds to the times measured before.

    `work` holds the measurements, by a hash of the job without its number of blocks. Raises MorphoQuantError with the
    calibration's message if it fails.
    """
    key = digest({name: value for name, value in asdict(job).items() if name != "blocks"})[:16]
    kept = work / f"measured-{key}.json"
    measured = _read(kept)
    wanted = None if job.blocks is None else set(range(job.blocks))
    if measured.finished or (wanted is not None and wanted <= measured.blocks.keys() and measured.profile):
        return measured
    work.mkdir(parents=True, exist_ok=True)
    job_file = work / f"job-{key}.json"
    job_file.write_text(json.dumps(asdict(job), indent=1) + "\n")
    threads = str(job.cores)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.calibrate.timing.worker", str(job_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    try:
        with MemoryWatch(process.pid) as watch:
            before, fresh = 0.0, True
            for line in process.stdout:
                event = _event(line)
                if event is None:
                    progress(line.rstrip())
                    continue
                entered = take(measured, event, before, fresh, watch.take())
                if entered:
                    progress(_line(event, event["time"] - before, measured.blocks[event["index"]]))
                fresh = fresh and not entered
                before = event["time"]
                write_atomically(kept, json.dumps(asdict(measured)) + "\n")
        if process.wait() != 0:
            raise MorphoQuantError(f"the calibration ended with exit status {process.returncode}; its message is above")
    finally:
        _stop(process)
    return measured


def _stop(process: subprocess.Popen[str]) -> None:
    """End the calibration as Ctrl-C does, which lets it remove half-written files; kill it if that takes long."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def take(measured: Measured, event: dict[str, Any], before: float, fresh: bool, peak: Peak) -> bool:
    """Enter one event, and say whether it was a block that was not known.

    `before` is the time of the event before; `fresh` says that no such block was entered in this run yet. Blocks that
    a continued run names again are those that it did not work on.
    """
    index = event.get("index")
    if event["event"] == "block" and index not in measured.blocks:
        seconds = event["time"] - before
        if fresh and index == 0:
            measured.to_first_block = seconds
        timed = None if fresh else seconds
        of_cores = None if fresh else event["cpu"]
        measured.blocks[index] = {"seconds": timed, "cpu": of_cores, "loss": event["loss"], **asdict(peak)}
        return True
    if event["event"] == "start":
        for dtype, rate in event["rates"].items():
            measured.rates[dtype] = max(rate, measured.rates.get(dtype, 0.0))
    elif event["event"] == "end":
        measured.finished = event["finished"]
        measured.after_last_block = event["time"] - before if event["finished"] else None
        measured.peak = max(measured.peak, event["peak"])
        measured.gpu_peak = max(measured.gpu_peak, event.get("gpu_peak", 0))
        measured.profile = event["profile"]
    return False


def _event(line: str) -> dict[str, Any] | None:
    """The worker's event in a line, or None for other output."""
    if not line.startswith('{"event"'):
        return None
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def _line(event: dict[str, Any], seconds: float, block: dict[str, Any]) -> str:
    resident, anonymous = block["resident"] / 2**30, block["anonymous"] / 2**30
    return (
        f"block {event['index'] + 1}/{event['count']}: {seconds:.1f} s, peak {resident:.2f} GiB resident, "
        f"{anonymous:.2f} GiB without mapped files"
    )


def _read(path: Path) -> Measured:
    if not path.is_file():
        return Measured()
    content = json.loads(path.read_text())
    content["blocks"] = {int(number): block for number, block in content["blocks"].items()}
    return Measured(**content)
