"""A saved sharded_state is served as the checkpoint that it was saved of, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests import tiny_models
from tests.engine.conftest import ENGINE, TEXT_PROMPT
from tests.engine.jobs import cores_of_ranks, run_jobs
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full

STATE = {"load_format": "sharded_state"}
EIGHT_BITS = {"additional_config": {"morphoquant": {"lm_head": "int8"}}}
TWO = {"tensor_parallel_size": 2}
# A Llama's head is its embedding; a Qwen2 has biases and its own head.
SERVED = {"llama": {}, "qwen2": {}, "qwen2, two ranks": TWO, "qwen2, compiled": {"enforce_eager": False}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the driver's jobs: "NAME" is the checkpoint's engine, "NAME, loaded" that of its saved state."""
    directory = tmp_path_factory.mktemp("sharded")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    for name, build in (("llama", tiny_models.build_tiny_llama), ("qwen2", tiny_models.build_tiny_qwen2)):
        calibrate(build(directory / f"{name}-source"), data, directory / name, recipe=recipe)
    jobs: dict[str, dict[str, Any]] = {}
    for name, settings in SERVED.items():
        model, state = str(directory / name.split(",")[0]), str(directory / f"state of {name}")
        jobs[name] = {"model": model, "engine": settings, "save": state}
        jobs[f"{name}, loaded"] = {"model": state, "engine": {**settings, **STATE}}
    one, qwen2 = str(directory / "state of qwen2"), str(directory / "qwen2")
    again = str(directory / "saved again")
    jobs |= {
        "saved again": {"model": one, "engine": STATE, "save": again},
        "loaded again": {"model": again, "engine": STATE},
        "8-bit head": {"model": qwen2, "engine": EIGHT_BITS, "save": str(directory / "not saved")},
        "8-bit head, loaded": {"model": one, "engine": {**STATE, **EIGHT_BITS}},
        "without a load format": {"model": one, "engine": {}},
        "a checkpoint": {"model": qwen2, "engine": STATE},
        "two ranks on one": {"model": str(directory / "state of qwen2, two ranks"), "engine": STATE},
        "with adapters": {"model": one, "engine": {**STATE, "enable_lora": True}},
        "reloaded": {"model": one, "engine": STATE, "reload": qwen2},
    }
    lines = {name: {**job, "engine": {**ENGINE, **job["engine"]}, "tokens": TEXT_PROMPT} for name, job in jobs.items()}
    return run_jobs("driver_sharded", lines, directory, timeout=900, variables=cores_of_ranks())[0]


@pytest.mark.parametrize("name", SERVED)
def test_a_loaded_state_answers_as_the_checkpoint_does(served: dict[str, Any], name: str) -> None:
    assert isinstance(served[name], list), served[name]
    assert served[f"{name}, loaded"] == served[name]


def test_a_loaded_state_can_be_saved(served: dict[str, Any]) -> None:
    assert served["loaded again"] == served["saved again"] == served["qwen2"]


def test_an_8_bit_head_is_made_of_a_state_and_not_saved(served: dict[str, Any]) -> None:
    assert "the 8-bit head keeps no 16-bit weight to save" in served["8-bit head"]
    differences = [abs(a - b) for a, b in zip(served["8-bit head, loaded"], served["qwen2"], strict=True)]
    assert 0 < max(differences) < 0.1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("without a load format", "serve it with --load-format sharded_state"),
        ("a checkpoint", "is no local directory with states that save_sharded_state wrote"),
        ("two ranks on one", "was saved with tensor parallel size 2 and 1 pipeline stages; serve it with the same"),
        ("with adapters", "its MLPs have another channel order than adapters"),
        # vLLM's own words.
        ("reloaded", "Model reloading with `sharded_state` format"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(served: dict[str, Any], name: str, line: str) -> None:
    assert line in served[name]
