"""Weights loaded again into a running engine: it then answers as an engine that was started with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests import tiny_models
from tests.checkpoints import flip_bit
from tests.engine.conftest import ENGINE, TEXT_PROMPT
from tests.engine.jobs import cores_of_ranks, run_jobs
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full

EIGHT_BITS = {"additional_config": {"morphoquant": {"lm_head": "int8"}}}
# The engine's settings by the model's name. A Llama's head is its embedding; a Qwen2 has biases and its own head.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, 8-bit head": {"dtype": "bfloat16", **EIGHT_BITS},
    "qwen2, 8-bit head": EIGHT_BITS,
    "qwen2, two ranks": {"tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Results of the driver's jobs by name; "NAME, fresh" is an engine that started with the reloaded weights."""
    directory = tmp_path_factory.mktemp("reload")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    for name, build in (("llama", tiny_models.build_tiny_llama), ("qwen2", tiny_models.build_tiny_qwen2)):
        for seed in (0, 1):
            source = build(directory / f"{name}-source-{seed}", seed)
            calibrate(source, data, directory / f"{name}-{seed}", recipe=recipe)
    damaged = Path(shutil.copytree(directory / "qwen2-1", directory / "damaged"))
    flip_bit(damaged, "model.layers.1.mlp.down_proj.weight_codes")
    jobs: dict[str, dict[str, Any]] = {}
    for name, settings in MODELS.items():
        first, second = (str(directory / f"{name.split(',')[0]}-{seed}") for seed in (0, 1))
        jobs[name] = {"model": first, "engine": settings, "reloads": [second, first]}
        jobs[f"{name}, fresh"] = {"model": second, "engine": settings, "reloads": []}
    jobs["qwen2, 8-bit head"]["reloads"].append(str(damaged))
    jobs["llama"]["reloads"].append(str(directory / "qwen2-0"))
    lines = {name: {**job, "engine": {**ENGINE, **job["engine"]}, "tokens": TEXT_PROMPT} for name, job in jobs.items()}
    return run_jobs("driver_reload", lines, directory, timeout=900, variables=cores_of_ranks())[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_reloaded_engine_answers_as_one_started_with_the_weights(served: dict[str, list[Any]], name: str) -> None:
    before, after, back = served[name][:3]
    (fresh,) = served[f"{name}, fresh"]
    assert after == fresh and back == before
    assert max(abs(one - other) for one, other in zip(before, after, strict=True)) > 1


def test_a_damaged_directory_is_refused_in_one_line(served: dict[str, list[Any]]) -> None:
    assert "is damaged (its SHA-256 is not the recorded one)" in served["qwen2, 8-bit head"][3]


def test_a_directory_of_other_settings_is_refused_in_one_line(served: dict[str, list[Any]]) -> None:
    line = served["llama"][3]
    assert "its layers, rows or token ids are not those that are served; start a new server" in line
