"""The graph passes inside an engine that compiles as GPUs do: what they match, and that answers stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from morphoquant_vllm.cpu import backend as cpu
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import ENGINE, TEXT_PROMPT, calibrate
from tests.engine.jobs import run_jobs
from tests.tiny_conversations import write_calibration_data

# Three compiled engines, 75 s and more, of a setting that is off by default: the passes have quick tests of their own.
pytestmark = pytest.mark.full


def results(checkpoint: Path, directory: Path, jobs: dict[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Of engines by name, compiled anew: MORPHOQUANT_FUSION and dtype of each."""
    settings = {
        "mode": 3,
        # vLLM would switch on fusions of FP8 and FP4, whose operators a CPU build does not have.
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    }
    lines = {
        name: {
            "model": str(checkpoint),
            "prompts": [{"prompt_token_ids": TEXT_PROMPT}, {"prompt_token_ids": TEXT_PROMPT[:7]}],
            "engine": ENGINE | {"enforce_eager": False, "dtype": dtype, "compilation_config": settings},
            "fusion": fusion,
        }
        for name, (fusion, dtype) in jobs.items()
    }
    caches = {"VLLM_CACHE_ROOT": str(directory / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(directory / "torch")}
    found, _ = run_jobs("driver_fusion", lines, directory, timeout=540, variables=caches)
    for result in found.values():
        assert "error" not in result, result["error"]
        assert result["compilation"] == "VLLM_COMPILE"
    return found


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels do not run on this machine")
def test_a_compiled_llama_fuses_every_norm_before_a_layer_of_ours(llama_source: Path, tmp_path: Path) -> None:
    """And answers as before in float32. In 16 bit torch's compiler rounds less often than what takes its place."""
    data = write_calibration_data(tmp_path / "data", "text")
    checkpoint = calibrate(llama_source, data, tmp_path / "checkpoint")
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    jobs = {"plain": ("0", "float32"), "fused": ("1", "float32"), "bfloat16": ("1", "bfloat16")}
    found = results(checkpoint, tmp_path, jobs)
    assert found["plain"]["matched"] == {"norms": 0, "silu_mul": 0}
    # The pattern of silu(gate) * up is that of 16 bit, as GPUs have it: float32 is not rounded in between.
    assert found["fused"]["matched"] == {"norms": 2 * layers, "silu_mul": 0}
    assert found["bfloat16"]["matched"] == {"norms": 2 * layers, "silu_mul": layers}
    assert all(len(request["token_ids"]) == 8 for request in found["bfloat16"]["requests"])
    for one, other in zip(found["fused"]["requests"], found["plain"]["requests"], strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert_same_logprobs(torch.tensor(one["prompt_logprobs"]), torch.tensor(other["prompt_logprobs"]))
