"""An FP8 cache of keys and values beside the 16-bit one, on a quantized checkpoint; its scales are 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def served(llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("kv cache")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(llama_source, data, directory / "checkpoint", recipe=recipe)
    job = {"model": str(directory / "checkpoint"), "prompts": [{"prompt_token_ids": TEXT_PROMPT}]}
    engines = Engines(directory)
    engines.run(
        {
            name: {**job, "engine": {**ENGINE, "dtype": "bfloat16", "kv_cache_dtype": name}}
            for name in ("auto", "fp8", "fp8_e5m2")
        }
    )
    return engines.results


def test_an_fp8_cache_is_used_and_the_finer_format_strays_less(served: dict[str, dict[str, Any]]) -> None:
    for result in served.values():
        assert "error" not in result, result["error"]
    auto, e4m3, e5m2 = (
        torch.tensor(served[name]["requests"][0]["prompt_logprobs"]) for name in ("auto", "fp8", "fp8_e5m2")
    )
    fine, coarse = ((found - auto).abs().mean() for found in (e4m3, e5m2))
    # Equal answers would mean a cache in 16 bit. Random weights feel 8 bits, but what was likely stays likely.
    assert 0 < float(fine) < float(coarse)
    assert float(torch.corrcoef(torch.stack((auto, e4m3)))[0, 1]) > 0.8
