"""Runs the engines of several jobs in one process of a driver, and reads their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engine.rows import REPOSITORY


def cores_of_ranks() -> dict[str, str]:
    """The variable that names the cores of two ranks: on one NUMA node vLLM wants them named."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")}


def run_jobs(
    driver: str,
    jobs: Mapping[str, Mapping[str, Any]],
    directory: Path,
    *,
    timeout: float,
    variables: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], str]:
    """What `tests.engine.<driver>` writes for each job, by the job's name, and its log.

    The driver writes each result to the job's "output". `variables` join the environment.
    """
    lines = [{**job, "output": str(directory / f"{name}.json")} for name, job in jobs.items()]
    file = directory / "jobs.json"
    file.write_text(json.dumps(lines))
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.{driver}", str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(variables or {})},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = {name: json.loads(Path(line["output"]).read_text()) for name, line in zip(jobs, lines, strict=True)}
    return results, done.stdout + done.stderr
