"""Qwen3-VL served: each token's row, and log-probabilities with a picture, whose features reach later blocks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

import morphoquant_vllm.hf
from tests.differing_rows import write_differing_rows
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import calibrate
from tests.engine.rows import (
    ENGINE,
    QUESTION,
    kinds_and_rows,
    reference_logprobs,
    run_jobs,
    served_logprobs,
    spec_rows,
)
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import image_bytes, write_calibration_data
from tests.tiny_media_models import build_tiny_qwen3_vl

pytestmark = [pytest.mark.slow, pytest.mark.full]

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = {"min_pixels": 4 * 32 * 32, "max_pixels": 16 * 32 * 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl") / "source")


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """Calibrated on text, pictures and a video; then its rows are made to differ, so that a wrong one is seen."""
    data = write_calibration_data(source.with_name("data"), "vl")
    return write_differing_rows(calibrate(source, data, source.with_name("checkpoint")), source.with_name("rows"))


@pytest.fixture(scope="module")
def prompts(source: Path) -> list[dict[str, Any]]:
    picture = source.with_name("picture.png")
    picture.write_bytes(image_bytes(20))
    filler = "The user asks the assistant a question and the assistant answers the user. "
    return [
        {"prompt": filler * 6},
        {"prompt": f"{IMAGE}Describe the picture.{filler * 4}", "media": {"image": [str(picture)]}},
    ]


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    limits = {"image": 1, "video": 0}
    engine = {**ENGINE, "mm_processor_kwargs": SIZES, "limit_mm_per_prompt": limits}
    job = {
        "model": str(checkpoint),
        "engine": engine,
        "passes": {"fresh": {"prompts": prompts, "prompt_logprobs": True}},
    }
    return run_jobs(checkpoint.parent, {"eager": job})


def test_each_token_takes_its_row(recorded: dict[str, Any], checkpoint: Path) -> None:
    steps = kinds_and_rows(recorded["eager"]["fresh"], spec_rows(checkpoint))
    assert {kind for kinds, _ in steps for kind in kinds} == {"text", "image"}
    for kinds, rows in steps:
        assert rows == kinds


def test_served_and_reloaded_logprobs_are_the_references(
    recorded: dict[str, Any], source: Path, checkpoint: Path, prompts: list[dict[str, Any]]
) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    expected = reference_logprobs(swap_linears(model, Checkpoint(checkpoint)), source, prompts[QUESTION])
    served = served_logprobs(recorded["eager"]["fresh"])
    print(f"largest difference of log-probabilities {float((served - expected).abs().max())}")
    assert_same_logprobs(served, expected)
    reloaded = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    morphoquant_vllm.hf.configure(reloaded, reference=True)
    assert_same_logprobs(reference_logprobs(reloaded, source, prompts[QUESTION]), expected)
