"""Models with pictures or sound whose processors are not Qwen2.5's: rows, and log-probabilities with a medium."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

import morphoquant_vllm.hf  # noqa: F401  (transformers learns the method)
from tests.differing_rows import write_differing_rows
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import calibrate
from tests.engine.rows import ENGINE, QUESTION, kinds_and_rows, run_jobs, served_logprobs, spec_rows
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import image_bytes, sound_bytes, write_calibration_data
from tests.tiny_internvl import IMAGE, build_tiny_internvl
from tests.tiny_media_models import build_tiny_gemma3, build_tiny_mistral3, build_tiny_qwen2_audio

pytestmark = [pytest.mark.slow, pytest.mark.full]

FILLER = "The user asks the assistant a question and the assistant answers the user. "


@dataclass(frozen=True)
class Case:
    """A model, its class in transformers, and the placeholder of its medium in a prompt."""

    build: Callable[[Path], Path]
    model_class: str
    medium: str
    placeholder: str
    # What vLLM's engine takes; other media are switched off.
    limits: dict[str, int]


CASES = {
    "gemma3": Case(build_tiny_gemma3, "Gemma3ForConditionalGeneration", "image", "<|vision_start|>", {"image": 1}),
    "internvl, qwen2": Case(
        build_tiny_internvl, "InternVLForConditionalGeneration", "image", IMAGE, {"image": 1, "video": 0}
    ),
    "internvl, qwen3": Case(
        lambda directory: build_tiny_internvl(directory, "qwen3"),
        "InternVLForConditionalGeneration",
        "image",
        IMAGE,
        {"image": 1, "video": 0},
    ),
    # By the generic path.
    "mistral3": Case(
        build_tiny_mistral3,
        "Mistral3ForConditionalGeneration",
        "image",
        "<|vision_start|><|image_pad|><|vision_end|>",
        {"image": 1},
    ),
    "qwen2_audio": Case(
        build_tiny_qwen2_audio,
        "Qwen2AudioForConditionalGeneration",
        "audio",
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
        {"audio": 1},
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case: `NAME/source`, its checkpoint calibrated on the medium, and `NAME/rows`, whose rows differ."""
    directory = tmp_path_factory.mktemp("media models")
    (directory / "image").write_bytes(image_bytes(20))
    (directory / "audio").write_bytes(sound_bytes(21))
    for name, case in CASES.items():
        place = directory / name
        data = write_calibration_data(place / "data", case.medium)
        checkpoint = calibrate(case.build(place / "source"), data, place / "checkpoint")
        write_differing_rows(checkpoint, place / "rows")
    return directory


def prompts(directory: Path, case: Case) -> list[dict[str, Any]]:
    question = f"{case.placeholder}Describe it.{FILLER * 4}"
    return [{"prompt": FILLER * 6}, {"prompt": question, "media": {case.medium: [str(directory / case.medium)]}}]


@pytest.fixture(scope="module")
def recorded(directory: Path) -> dict[str, Any]:
    jobs = {
        name: {
            "model": str(directory / name / "rows"),
            "engine": {**ENGINE, "mm_processor_kwargs": None, "limit_mm_per_prompt": case.limits},
            "passes": {"fresh": {"prompts": prompts(directory, case), "prompt_logprobs": True}},
        }
        for name, case in CASES.items()
    }
    return run_jobs(directory, jobs)


@pytest.mark.parametrize("name", CASES)
def test_each_token_takes_its_row(recorded: dict[str, Any], directory: Path, name: str) -> None:
    steps = kinds_and_rows(recorded[name]["fresh"], spec_rows(directory / name / "rows"))
    assert {kind for kinds, _ in steps for kind in kinds} == {"text", CASES[name].medium}
    for kinds, rows in steps:
        assert rows == kinds


@pytest.mark.parametrize("name", CASES)
def test_served_and_reloaded_logprobs_are_the_references(recorded: dict[str, Any], directory: Path, name: str) -> None:
    case, place = CASES[name], directory / name
    model_class = getattr(transformers, case.model_class)
    prompt = prompts(directory, case)[QUESTION]
    source = model_class.from_pretrained(place / "source", dtype=torch.float32)
    checkpoint = Checkpoint(place / "rows")
    # Files of older versions of transformers have other names than its modules.
    stored = next(iter(checkpoint.spec.layers)).split("layers.")[0]
    expected = logprobs(swap_linears(source, checkpoint, stored, "model.language_model."), place / "source", prompt)
    served = served_logprobs(recorded[name]["fresh"])
    print(f"{name}: largest difference of log-probabilities {float((served - expected).abs().max())}")
    assert_same_logprobs(served, expected)
    reloaded = model_class.from_pretrained(place / "rows", dtype=torch.float32)
    assert_same_logprobs(logprobs(reloaded, place / "source", prompt), expected)


def logprobs(model: Any, source: Path, prompt: dict[str, Any]) -> Tensor:
    """Log probability of every token of the prompt but the first."""
    media: dict[str, Any] = {}
    for kind, (path,) in prompt["media"].items():
        media |= (
            {"images": [Image.open(path).convert("RGB")]}
            if kind == "image"
            else {"audio": [soundfile.read(path, dtype="float32")[0]], "sampling_rate": 16000}
        )
    inputs = AutoProcessor.from_pretrained(source)(text=[prompt["prompt"]], **media, return_tensors="pt")
    # vLLM's attention on a CPU has no mask but the causal one. With these ids Gemma 3 would look at a picture's tokens
    # in both directions, as vLLM does on a GPU.
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, inputs["input_ids"][0, 1:, None]).flatten()
