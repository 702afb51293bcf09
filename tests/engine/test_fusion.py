"""The graph passes inside an engine that compiles as GPUs do: what they match, and that answers stay the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from morphoquant_vllm.cpu import backend as cpu
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import ENGINE, TEXT_PROMPT, calibrate
from tests.engine.rows import REPOSITORY
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.slow


def answers(checkpoint: Path, directory: Path, fusion: str) -> dict[str, Any]:
    """Of one engine, compiled anew, with MORPHOQUANT_FUSION set to `fusion`."""
    settings = {
        "mode": 3,
        # vLLM would switch on fusions of FP8 and FP4, whose operators a CPU build does not have.
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    }
    job = {
        "model": str(checkpoint),
        "prompts": [{"prompt_token_ids": TEXT_PROMPT}, {"prompt_token_ids": TEXT_PROMPT[:7]}],
        "engine": ENGINE | {"enforce_eager": False, "compilation_config": settings},
        "output": str(directory / f"{fusion}.json"),
    }
    jobs = directory / f"jobs{fusion}.json"
    jobs.write_text(json.dumps([job]))
    caches = {"VLLM_CACHE_ROOT": str(directory / fusion), "TORCHINDUCTOR_CACHE_DIR": str(directory / fusion / "torch")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.driver_fusion", str(jobs)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | caches | {"MORPHOQUANT_FUSION": fusion},
    )
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[-60:])
    result: dict[str, Any] = json.loads(Path(job["output"]).read_text())
    assert "error" not in result, result["error"]
    assert result["compilation"] == "VLLM_COMPILE"
    return result


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels do not run on this machine")
def test_a_compiled_llama_fuses_every_norm_before_a_layer_of_ours(llama_source: Path, tmp_path: Path) -> None:
    data = write_calibration_data(tmp_path / "data", "text")
    checkpoint = calibrate(llama_source, data, tmp_path / "checkpoint")
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    plain, fused = (answers(checkpoint, tmp_path, fusion) for fusion in ("0", "1"))
    assert plain["matched"] == {"norms": 0, "silu_mul": 0}
    assert fused["matched"] == {"norms": 2 * layers, "silu_mul": layers}
    for one, other in zip(fused["requests"], plain["requests"], strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert_same_logprobs(torch.tensor(one["prompt_logprobs"]), torch.tensor(other["prompt_logprobs"]))
