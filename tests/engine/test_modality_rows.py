"""Every token of a running engine is quantized by its own modality's row, token by token; what the fallback serves.

The truth is where a request's media lie (recording.py), never a token id. The checkpoint's rows differ, so that a wrong
row is also seen in the model's output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.agreement import assert_same_logprobs
from tests.engine.rows import (
    ENGINE,
    assert_every_token_has_its_row,
    kinds_and_rows,
    run_jobs,
    served_logprobs,
    shape_of_steps,
    spec_rows,
    without_log_probabilities,
)
from tests.reference_model import Checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(
    rows_checkpoint: Path, prompts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Two engines: one that switches rows, at last with a wrong table; one that cannot."""
    rows = Checkpoint(rows_checkpoint).spec.rows
    fresh = {"prompts": prompts, "prompt_logprobs": True}
    passes = {
        "fresh": fresh,
        "again": without_log_probabilities(prompts),
        "wrong table": {**fresh, "swap": [rows.index("image"), rows.index("audio")]},
    }
    job = {"model": str(rows_checkpoint), "engine": ENGINE, "passes": passes}
    fallback = {**job, "engine": {**ENGINE, "enable_prompt_embeds": True}, "passes": {"fresh": fresh}}
    return run_jobs(tmp_path_factory.mktemp("rows"), {"eager": job, "fallback": fallback})


def test_each_token_takes_its_row_in_mixed_chunked_and_interleaved_steps(
    recorded: dict[str, Any], rows_checkpoint: Path
) -> None:
    result = recorded["eager"]["fresh"]
    assert_every_token_has_its_row(result, spec_rows(rows_checkpoint))
    assert "image" in {kind for kinds, _ in kinds_and_rows(result, spec_rows(rows_checkpoint)) for kind in kinds}
    shapes = shape_of_steps(result)
    for shape in ("mixed", "decode only", "several requests with media", "chunk starts inside a medium", "interleaved"):
        assert shapes[shape], f"no step was: {shape}"


def test_each_token_takes_its_row_where_prefixes_are_cached(recorded: dict[str, Any], rows_checkpoint: Path) -> None:
    result = recorded["eager"]["again"]
    assert [request["cached"] > 0 for request in result["requests"]] == [True, True, False, True]
    assert_every_token_has_its_row(result, spec_rows(rows_checkpoint))
    assert shape_of_steps(result)["chunk starts inside a medium"]


def test_served_output_is_the_references_with_the_same_rows(
    recorded: dict[str, Any], by_modality: torch.Tensor, by_any: torch.Tensor
) -> None:
    served = served_logprobs(recorded["eager"]["fresh"])
    assert_same_logprobs(served, by_modality)
    with pytest.raises(AssertionError, match="lie apart"):
        assert_same_logprobs(served, by_any)


def test_wrong_ids_are_seen(recorded: dict[str, Any], rows_checkpoint: Path, by_modality: torch.Tensor) -> None:
    """The negative control: the checks above fail when the bus takes images for sounds."""
    result = recorded["eager"]["wrong table"]
    with pytest.raises(AssertionError):
        assert_every_token_has_its_row(result, spec_rows(rows_checkpoint))
    swapped = {"image": "audio", "audio": "image"}
    for kinds, rows in kinds_and_rows(result, spec_rows(rows_checkpoint)):
        assert rows == [swapped.get(kind, kind) for kind in kinds]
    with pytest.raises(AssertionError, match="lie apart"):
        assert_same_logprobs(served_logprobs(result), by_modality)


def test_the_fallback_has_exactly_the_numerics_of_any(
    recorded: dict[str, Any], rows_checkpoint: Path, by_any: torch.Tensor
) -> None:
    result = recorded["fallback"]["fresh"]
    assert {row for _, rows in kinds_and_rows(result, spec_rows(rows_checkpoint)) for row in rows} == {"any"}
    assert_same_logprobs(served_logprobs(result), by_any)


def test_the_mode_is_logged_once_with_the_reason(recorded: dict[str, Any]) -> None:
    lines = [line.split("MorphoQuant: ")[1] for line in recorded["log"].splitlines() if "MorphoQuant: " in line]
    lines = [line for line in lines if not line.endswith("all in order")]
    assert len(lines) == 2
    assert lines[0].startswith("every token is quantized by its modality's row; placeholder tokens {'image': [")
    assert lines[1] == "row 'any' quantizes the tokens of every modality (prompts may come as embeddings)"
