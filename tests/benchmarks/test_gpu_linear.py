"""The GPU benchmark: refuses without a GPU; with one, it writes a result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu_linear", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_it_refuses_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: no GPU is at hand: this benchmark measures on one; see benchmarks.gpu_cost_model"
    ]
    assert not (tmp_path / "results").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_it_measures_on_the_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path), "--tokens", "1", "--layers", "o", "--methods", "bf16", "morphoquant")
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.json")
    assert all(row["us"] > 0 for row in json.loads(written.read_text())["rows"])
