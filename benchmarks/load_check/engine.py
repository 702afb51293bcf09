"""Time that vLLM takes to construct an engine, with the plugin's checks of a checkpoint and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.load_check.checks import drop_from_cache
from morphoquant_vllm.errors import MorphoQuantError

# Checks before workers start: those before format v3, all except SHA-256, NaN and infinity, or all.
LEVELS = ("headers", "values", "all")
# Prefix of a worker's line of output; vLLM writes others.
MARK = "load_check: "


def measure(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from the engine's arguments to an engine that takes requests, each level once in every round.

    Every engine reads the weights from the disk once.
    """
    found: dict[str, list[float]] = {level: [] for level in LEVELS}
    for number in range(rounds):
        # Levels alternate, so disturbances of the machine affect all alike.
        for level in LEVELS[number % len(LEVELS) :] + LEVELS[: number % len(LEVELS)]:
            drop_from_cache(directory)
            found[level].append(_start(directory, level))
    return found


def _start(directory: Path, level: str) -> float:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "MORPHOQUANT_CHECKSUMS": "1" if level == "all" else "0",
    }
    command = [sys.executable, "-m", "benchmarks.load_check.worker", str(directory), level]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return float(json.loads(line.removeprefix(MARK)))
    end = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise MorphoQuantError(f"{directory}: no engine started; its last line: {end}")
