"""Image towers quantized on request: calibrated by the real command, served, and equal to transformers' reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

import morphoquant_vllm.hf
from morphoquant_vllm.format.checkpoint import read_spec
from tests import tiny_models
from tests.engine.agreement import LOGPROB_TOLERANCE, assert_same_logprobs
from tests.engine.conftest import ENGINE as ONE_STEP
from tests.engine.conftest import Engines, calibrate
from tests.engine.rows import ENGINE, reference_logprobs, run_jobs, served_logprobs
from tests.quantized_tower import write_quantized_tower
from tests.tiny_conversations import image_bytes, write_calibration_data
from tests.tiny_media_models import build_tiny_qwen3_vl

pytestmark = [pytest.mark.slow, pytest.mark.full]

# Class of transformers, and the module that holds its image tower.
MODELS = {
    "omni": (Qwen2_5OmniThinkerForConditionalGeneration, ""),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, "model."),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, "model."),
}
MODES: dict[str, dict[str, Any]] = {"one rank": {}, "two ranks": {"tensor_parallel_size": 2}}


def vl_prompts(directory: Path) -> list[dict[str, Any]]:
    """Text; a question about two pictures."""
    files = [directory / f"picture{index}.png" for index in range(2)]
    for index, file in enumerate(files):
        file.write_bytes(image_bytes(60 + index))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    return [
        {"prompt": "Two rivers meet below the old town, where the market is held."},
        {"prompt": f"{picture}Describe the picture.{picture}And this?", "media": {"image": [str(f) for f in files]}},
    ]


@pytest.fixture(scope="module", params=sorted(MODELS))
def served(
    request: pytest.FixtureRequest,
    omni_source: Path,
    omni_data: Path,
    prompts: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, Path, dict[str, Any], dict[str, Any]]:
    """The model's name, its source and checkpoint, the compared question, and the engines' results."""
    directory = tmp_path_factory.mktemp(f"tower of {request.param}")
    source, data, engine = omni_source, omni_data, ENGINE
    if request.param != "omni":
        build = {"qwen2_5_vl": tiny_models.build_tiny_qwen2_5_vl, "qwen3_vl": build_tiny_qwen3_vl}[request.param]
        source = build(directory / "source")
        data = write_calibration_data(directory / "data", "vl")
        prompts = vl_prompts(directory)
        engine = {**ENGINE, "limit_mm_per_prompt": {"image": 2, "video": 1}}
    checkpoint = calibrate(source, data, directory / "checkpoint", "--tower", "image")
    passes = {"fresh": {"prompts": prompts, "prompt_logprobs": True}}
    jobs = {
        mode: {"model": str(checkpoint), "engine": {**engine, **changes}, "passes": passes}
        for mode, changes in MODES.items()
    }
    return request.param, source, checkpoint, prompts[1], run_jobs(directory, jobs)


@pytest.mark.parametrize("mode", list(MODES))
def test_served_output_is_the_reloads(
    served: tuple[str, Path, Path, dict[str, Any], dict[str, Any]], mode: str
) -> None:
    name, source, checkpoint, question, results = served
    assert sum(layer.fixed_row == "image" for layer in read_spec(checkpoint).layers.values()) >= 8
    loader, prefix = MODELS[name]
    model = loader.from_pretrained(checkpoint, dtype=torch.float32).eval()
    morphoquant_vllm.hf.configure(model, reference=True)
    found = served_logprobs(results[mode]["fresh"])
    assert_same_logprobs(found, reference_logprobs(model, source, question))
    plain = loader.from_pretrained(source, dtype=torch.float32).eval()
    model.set_submodule(f"{prefix}visual", plain.get_submodule(f"{prefix}visual"))
    gap = (found - reference_logprobs(model, source, question)).abs().max()
    assert float(gap) > 10 * LOGPROB_TOLERANCE, "a tower in 16 bit would be seen"


def test_an_audio_tower_that_a_checkpoint_lists_by_mistake_is_refused(
    tp1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It is transformers' own module, which no quantization method of vLLM reaches."""
    directory = tmp_path_factory.mktemp("audio tower")
    layers = write_quantized_tower(
        tp1_checkpoint, directory / "checkpoint", 1, "thinker.audio_tower.layers", {"fc1": ("fc1",)}
    )
    assert layers == ["thinker.audio_tower.layers.0.fc1"]
    engines = Engines(directory)
    engines.run({"audio": {"model": str(directory / "checkpoint"), "prompts": [], "engine": ONE_STEP}})
    errors = engines.results["audio"]["error"]
    assert "no module or parameter named 'audio_tower.layers.0.fc1." in errors[-1]
