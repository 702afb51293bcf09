"""An FP8 cache of keys and values beside the 16-bit one: with calibrated scales, and with scales of 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests.checkpoints import seal_again
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full

# Factors of keys and values; queries and outputs are divided by them, so the model computes the same.
LARGE = {"k_proj": 2.0**9, "q_proj": 2.0**-9, "v_proj": 2.0**9, "o_proj": 2.0**-9}


def with_large_keys(source: Path, target: Path) -> Path:
    """A copy of a model whose keys and values are far above 448, the largest number of FP8."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        tensors[name] = tensor * LARGE.get(name.split(".")[-2], 1.0)
    save_file(tensors, file, {"format": "pt"})
    return target


def without_scales(checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint as it was before calibration measured magnitudes."""
    shutil.copytree(checkpoint, target)
    config = json.loads((target / "config.json").read_text())
    assert len(config["quantization_config"].pop("kv_cache")) == config["num_hidden_layers"]
    (target / "config.json").write_text(json.dumps(config))
    seal_again(target)
    return target


@pytest.fixture(scope="module")
def served(llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("kv cache")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    large = with_large_keys(llama_source, directory / "large source")
    for name, source in (("plain", llama_source), ("large", large)):
        calibrate(source, data, directory / name, recipe=recipe)
    without_scales(directory / "large", directory / "large without scales")
    served = [("plain", kind) for kind in ("auto", "fp8", "fp8_e5m2")]
    served += [("large", "auto"), ("large", "fp8"), ("large without scales", "fp8")]
    engines = Engines(directory)
    engines.run(
        {
            f"{name}, {kind}": {
                "model": str(directory / name),
                "prompts": [{"prompt_token_ids": TEXT_PROMPT}],
                "engine": {**ENGINE, "dtype": "bfloat16", "kv_cache_dtype": kind},
            }
            for name, kind in served
        }
    )
    return engines.results


def logprobs(served: dict[str, dict[str, Any]], name: str) -> torch.Tensor:
    assert "error" not in served[name], served[name]["error"]
    return torch.tensor(served[name]["requests"][0]["prompt_logprobs"])


def test_an_fp8_cache_is_used_and_the_finer_format_strays_less(served: dict[str, dict[str, Any]]) -> None:
    auto, e4m3, e5m2 = (logprobs(served, f"plain, {kind}") for kind in ("auto", "fp8", "fp8_e5m2"))
    fine, coarse = ((found - auto).abs().mean() for found in (e4m3, e5m2))
    # Equal answers would mean a cache in 16 bit. Random weights feel 8 bits, but what was likely stays likely.
    assert 0 < float(fine) < float(coarse)
    assert float(torch.corrcoef(torch.stack((auto, e4m3)))[0, 1]) > 0.8


def test_calibrated_scales_serve_keys_that_fp8_would_clip(served: dict[str, dict[str, Any]]) -> None:
    auto, scaled, clipped = (
        logprobs(served, name) for name in ("large, auto", "large, fp8", "large without scales, fp8")
    )
    with_scales, without = (float((found - auto).abs().mean()) for found in (scaled, clipped))
    assert 0 < with_scales < 0.25 * without, (with_scales, without)
