"""Environments of other releases, each in a folder of `.cache`: made once, with this checkout in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.engine.rows import REPOSITORY

CACHE = REPOSITORY / ".cache"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def environment(folder: str, *steps: Sequence[str]) -> Path:
    """Python of an environment with this project; each step has arguments of `pip install`, run in turn.

    Skips if the package index does not provide a step's packages.
    """
    directory = CACHE / folder
    python, complete = directory / "bin" / "python", directory / ".complete"
    if complete.is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile"]
    for step in steps:
        # PyPI has no CPU build of torch; PyTorch's index has one.
        for index in ((), ("--extra-index-url", TORCH_CPU_INDEX)):
            done = subprocess.run([*pip, *index, *step], capture_output=True, text=True)
            if not done.returncode:
                break
        else:
            pytest.skip(f"{' '.join(step)} cannot be installed: {' '.join(done.stderr.split())[-200:]}")
    project = ["--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)]
    for command in ([*pip, *project], [str(python), "-m", "morphoquant_vllm.doctor.mends", "--apply"]):
        done = subprocess.run(command, capture_output=True, text=True, cwd=CACHE)
        assert done.returncode == 0, done.stderr[-3000:]
    complete.touch()
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an environment's Python on this checkout."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=1800)
