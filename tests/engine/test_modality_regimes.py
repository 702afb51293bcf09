"""The row of every token in regimes that take long: compiled, two ranks, two stages; a quantized image tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.agreement import LOGPROB_TOLERANCE, assert_same_logprobs
from tests.engine.rows import (
    ENGINE,
    QUESTION,
    assert_every_token_has_its_row,
    kinds_and_rows,
    reference_logprobs,
    run_jobs,
    served_logprobs,
    spec_rows,
    without_log_probabilities,
)
from tests.quantized_tower import write_quantized_tower
from tests.reference_model import Checkpoint, reference_thinker

pytestmark = [pytest.mark.slow, pytest.mark.full]

SWITCHING: dict[str, dict[str, Any]] = {
    "compiled": {"enforce_eager": False},
    "whole prompts": {"max_num_batched_tokens": 2048},
    "two ranks": {"tensor_parallel_size": 2},
    "two ranks compiled": {"tensor_parallel_size": 2, "enforce_eager": False},
}


@pytest.fixture(scope="module")
def regimes(
    rows_checkpoint: Path, prompts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    passes = {"fresh": {"prompts": prompts, "prompt_logprobs": True}, "again": without_log_probabilities(prompts)}
    jobs = {
        name: {"model": str(rows_checkpoint), "engine": {**ENGINE, **changes}, "passes": passes}
        for name, changes in SWITCHING.items()
    }
    return run_jobs(tmp_path_factory.mktemp("regimes"), jobs)


@pytest.mark.parametrize("regime", list(SWITCHING))
def test_each_token_takes_its_row_in_every_regime(
    regimes: dict[str, Any], rows_checkpoint: Path, by_modality: torch.Tensor, regime: str
) -> None:
    ranks = SWITCHING[regime].get("tensor_parallel_size", 1)
    for result in regimes[regime].values():
        assert_every_token_has_its_row(result, spec_rows(rows_checkpoint), ranks)
    assert_same_logprobs(served_logprobs(regimes[regime]["fresh"]), by_modality)


def test_pipeline_parallel_ranks_serve_any(
    rows_checkpoint: Path,
    prompts: list[dict[str, Any]],
    by_any: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # Not eager: without a warm-up vLLM's CPU runner has no buffers for the first stage's outputs.
    engine = {**ENGINE, "pipeline_parallel_size": 2, "enforce_eager": False}
    passes = {"fresh": {"prompts": prompts, "prompt_logprobs": True}}
    job = {"model": str(rows_checkpoint), "engine": engine, "passes": passes}
    recorded = run_jobs(tmp_path_factory.mktemp("stages"), {"stages": job})
    result = recorded["stages"]["fresh"]
    assert [worker["layers"] for worker in result["workers"]] == [4, 4]
    assert {row for _, rows in kinds_and_rows(result, spec_rows(rows_checkpoint)) for row in rows} == {"any"}
    assert "(pipeline parallelism: later ranks see no token ids)" in recorded["log"]
    assert_same_logprobs(served_logprobs(result), by_any)


def test_an_image_tower_is_quantized_on_request_with_its_own_row(
    omni_source: Path,
    tp1_checkpoint: Path,
    prompts: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("tower")
    layers = write_quantized_tower(tp1_checkpoint, directory / "checkpoint", blocks=2)
    checkpoint = Checkpoint(directory / "checkpoint")
    assert set(layers) < set(checkpoint.spec.layers) and len(layers) == 12
    passes = {"fresh": {"prompts": prompts, "prompt_logprobs": True}}
    job = {"model": str(directory / "checkpoint"), "engine": ENGINE, "passes": passes}
    result = run_jobs(directory, {"tower": job})["tower"]["fresh"]
    # The decoder's layers switch as ever; the tower's are not among those that read the buffer.
    assert_every_token_has_its_row(result, checkpoint.spec.rows)
    served = served_logprobs(result)
    expected = reference_logprobs(reference_thinker(omni_source, checkpoint), omni_source, prompts[QUESTION])
    assert_same_logprobs(served, expected)
    plain = reference_thinker(omni_source, Checkpoint(tp1_checkpoint))
    gap = (served - reference_logprobs(plain, omni_source, prompts[QUESTION])).abs().max()
    assert float(gap) > 100 * LOGPROB_TOLERANCE, "a tower in 16 bit would be seen"
