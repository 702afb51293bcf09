"""Speculative decoding of a quantized checkpoint: n-grams and a 16-bit draft change no answer.

A MorphoQuant draft, of a 16-bit and of a quantized model, is in `test_whole`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full

# A prompt that repeats itself, so that its n-grams foretell something.
PROMPTS = [{"prompt_token_ids": TEXT_PROMPT[:8] * 6}, {"prompt_token_ids": list(range(100, 130))}]
# n-grams come last: vLLM loads numba for them, after which a draft's engine does not start in the same process.
DRAFTS: dict[str, dict[str, Any]] = {
    "16-bit draft": {"method": "draft_model", "num_speculative_tokens": 2},
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
}


@pytest.fixture(scope="module")
def served(llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("speculation")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(llama_source, data, directory / "checkpoint", recipe=recipe)
    jobs = {"alone": ENGINE}
    for name, settings in DRAFTS.items():
        model = {"model": str(llama_source)} if settings["method"] == "draft_model" else {}
        jobs[name] = {**ENGINE, "speculative_config": {**settings, **model}, "disable_log_stats": False}
    engines = Engines(directory)
    engines.run(
        {
            name: {"model": str(directory / "checkpoint"), "prompts": PROMPTS, "max_tokens": 24, "engine": engine}
            for name, engine in jobs.items()
        }
    )
    return engines.results


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_changes_no_answer(served: dict[str, dict[str, Any]], name: str) -> None:
    answers = [[request["token_ids"] for request in served[job]["requests"]] for job in (name, "alone")]
    assert answers[0] == answers[1] and served[name]["drafted"] > 0


def test_the_source_drafts_for_its_checkpoint(served: dict[str, dict[str, Any]]) -> None:
    assert served["16-bit draft"]["accepted"] > 0
