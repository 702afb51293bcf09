"""The GPU benchmark: refuses without a GPU; with one, it writes a result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_linear.report import markdown


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu_linear", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_it_refuses_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: this machine has no GPU; run it on one, or estimate with benchmarks.gpu_cost_model"
    ]
    assert not (tmp_path / "results").exists()


def test_vllm_s_kernels_find_their_groups_and_leave_none_behind() -> None:
    """In a process of its own: groups are the process's. Without them a peer's layer ends in an assertion."""
    code = """
from benchmarks.gpu_linear.__main__ import vllm_context, why_no_vllm
assert why_no_vllm() == ""
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, model_parallel_is_initialized
assert not model_parallel_is_initialized()
with vllm_context():
    assert get_tensor_model_parallel_world_size() == 1
    get_current_vllm_config()
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    ColumnParallelLinear(64, 32, bias=False)
assert not model_parallel_is_initialized()
print("sound")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("sound"), done.stderr


def test_the_table_tells_the_host_s_time_beside_the_device_s() -> None:
    shape = {"layer": "o", "N": 8, "K": 8, "M": 1}
    rows = [
        shape | {"method": "bf16", "us": 20.0, "spread": 1.0, "host_us": 9.4},
        shape | {"method": "morphoquant", "us": 8.0, "spread": 1.0, "host_us": 31.6},
        shape | {"method": "marlin-w4a16", "skipped": "no such kernel"},
    ]
    text = markdown({"device": "D", "group_size": 32, "versions": {}, "rows": rows})
    assert "| o | 1 | 20.0 (1.00x), host 9 | 8.0 (2.50x), host 32 | no such kernel |" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_it_measures_on_the_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path), "--tokens", "1", "--layers", "o", "--methods", "bf16", "morphoquant")
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.json")
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in json.loads(written.read_text())["rows"])
