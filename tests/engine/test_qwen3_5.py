"""Qwen3.5 served, whose blocks have full or linear attention: layers, rows, log-probabilities, both convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

import morphoquant_vllm.hf  # noqa: F401  (transformers learns the method)
from tests.differing_rows import write_differing_rows
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import ENGINE as TEXT_ENGINE
from tests.engine.conftest import TEXT_PROMPT, Engines, calibrate
from tests.engine.layers import assert_layers_are_the_reference
from tests.engine.linear_attention import CONVOLUTIONS
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
from tests.tiny_media_models import build_tiny_qwen3_5, build_tiny_qwen3_5_text

pytestmark = [pytest.mark.slow, pytest.mark.full]

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = {"min_pixels": 4 * 32 * 32, "max_pixels": 16 * 32 * 32}
SIXTEEN_BIT = {"linear_attn.in_proj_ba", "linear_attn.conv1d"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3_5(tmp_path_factory.mktemp("qwen3_5") / "source")


@pytest.fixture(scope="module")
def calibrated(source: Path) -> Path:
    """Calibrated on text, pictures and a video."""
    return calibrate(source, write_calibration_data(source.with_name("data"), "vl"), source.with_name("calibrated"))


@pytest.fixture(scope="module")
def checkpoint(calibrated: Path) -> Path:
    """Its rows are made to differ, so that a wrong one is seen."""
    return write_differing_rows(calibrated, calibrated.with_name("rows"))


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
    """Prompts are prefilled in chunks, so that states are carried from step to step."""
    limits = {"image": 1, "video": 0}
    job = {
        "model": str(checkpoint),
        "engine": {**ENGINE, "mm_processor_kwargs": SIZES, "limit_mm_per_prompt": limits},
        "linear_attention": "c++",
        "passes": {"fresh": {"prompts": prompts, "prompt_logprobs": True}},
    }
    return run_jobs(checkpoint.parent, {"float32": job})


@pytest.fixture(scope="module")
def bfloat16(source: Path, calibrated: Path) -> dict[str, dict[str, Any]]:
    """Engines whose attention is vLLM's own: the source's, and the checkpoint's with either convolution."""
    engines = Engines(source.parent)
    settings = {**TEXT_ENGINE, "dtype": "bfloat16", "limit_mm_per_prompt": {"image": 0, "video": 0}}
    job = {"prompts": [{"prompt_token_ids": TEXT_PROMPT}], "engine": settings}
    engines.run(
        {
            "source": {**job, "model": str(source), "linear_attention": "c++"},
            **{
                name: {
                    **job,
                    "model": str(calibrated),
                    "linear_attention": name,
                    "capture": str(source.with_name(f"{name}.safetensors")),
                }
                for name in CONVOLUTIONS
            },
        }
    )
    return engines.results


@pytest.fixture(scope="module")
def text_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """`model` and `checkpoint` of the language model alone; the engines of one rank and of two, in float32."""
    directory = tmp_path_factory.mktemp("qwen3_5_text")
    model = build_tiny_qwen3_5_text(directory / "model")
    made = calibrate(model, write_calibration_data(directory / "data", "text"), directory / "checkpoint")
    job = {"model": str(made), "prompts": [{"prompt_token_ids": TEXT_PROMPT}], "linear_attention": "c++"}
    two = {"tensor_parallel_size": 2, "worker_extension_cls": "tests.engine.float32_workers.Float32Workers"}
    engines = Engines(directory)
    engines.run({"one": {**job, "engine": TEXT_ENGINE}, "two": {**job, "engine": {**TEXT_ENGINE, **two}}}, timeout=1800)
    return directory, engines.results


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_the_language_model_alone_is_served_on_one_rank_and_on_two(
    text_alone: tuple[Path, dict[str, dict[str, Any]]], ranks: str
) -> None:
    """On two ranks each has its heads of the one matrix in_proj_qkv, and of in_proj_z."""
    directory, results = text_alone
    assert "error" not in results[ranks], results[ranks]["error"]
    plain = Qwen3_5ForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    expected = text_logprobs(swap_linears(plain, Checkpoint(directory / "checkpoint")))
    served = torch.tensor(results[ranks]["requests"][0]["prompt_logprobs"])
    print(f"{ranks}: largest difference of log-probabilities {float((served - expected).abs().max())}")
    assert_same_logprobs(served, expected)
    reloaded = Qwen3_5ForCausalLM.from_pretrained(directory / "checkpoint", dtype=torch.float32)
    assert_same_logprobs(text_logprobs(reloaded), expected)


def text_logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TEXT_PROMPT])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(TEXT_PROMPT[1:])[:, None]).flatten()


def float32_source(source: Path) -> Any:
    return Qwen3_5ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)


def test_each_token_takes_its_row(recorded: dict[str, Any], checkpoint: Path) -> None:
    steps = kinds_and_rows(recorded["float32"]["fresh"], spec_rows(checkpoint))
    assert {kind for kinds, _ in steps for kind in kinds} == {"text", "image"}
    for kinds, rows in steps:
        assert rows == kinds


def test_served_and_reloaded_logprobs_are_the_references(
    recorded: dict[str, Any], source: Path, checkpoint: Path, prompts: list[dict[str, Any]]
) -> None:
    model = swap_linears(float32_source(source), Checkpoint(checkpoint))
    expected = reference_logprobs(model, source, prompts[QUESTION])
    served = served_logprobs(recorded["float32"]["fresh"])
    print(f"largest difference of log-probabilities {float((served - expected).abs().max())}")
    assert_same_logprobs(served, expected)
    reloaded = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    assert_same_logprobs(reference_logprobs(reloaded, source, prompts[QUESTION]), expected)


def test_every_linear_but_those_of_the_decay_is_quantized(bfloat16: dict[str, dict[str, Any]]) -> None:
    methods = {
        layer.split(".layers.")[1].split(".", 1)[1]: method
        for layer, method in bfloat16["c++"]["methods"].items()
        if ".layers." in layer and "Linear" in method
    }
    assert {layer for layer, method in methods.items() if method != "MorphoQuantLinearMethod"} == SIXTEEN_BIT
    assert {"linear_attn.in_proj_qkvz", "linear_attn.out_proj", "self_attn.qkv_proj"} <= set(methods)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_layers_between_vllms_own_attention_are_the_references(
    bfloat16: dict[str, dict[str, Any]], calibrated: Path, convolution: str
) -> None:
    prefix = ("language_model.model.", "model.language_model.")
    assert_layers_are_the_reference(bfloat16[convolution], Checkpoint(calibrated), torch.bfloat16, prefix)


@pytest.mark.parametrize("engine", CONVOLUTIONS)
def test_bfloat16_costs_no_more_with_four_bits_than_four_bits_do(
    bfloat16: dict[str, dict[str, Any]], source: Path, calibrated: Path, engine: str
) -> None:
    """Codes at ties go the other way in bfloat16, and later blocks differ; so distances to 16 bit are compared."""
    sixteen_bit = text_logprobs(float32_source(source))
    # An engine without media has no row but any.
    four_bit = text_logprobs(swap_linears(float32_source(source), Checkpoint(calibrated), by_modality=False))

    def distance(name: str) -> float:
        return float((torch.tensor(bfloat16[name]["requests"][0]["prompt_logprobs"]) - sixteen_bit).abs().mean())

    of_reference = float((four_bit - sixteen_bit).abs().mean())
    print(f"{engine}: {distance(engine):.3f}, reference {of_reference:.3f}, 16 bit {distance('source'):.3f}")
    assert distance(engine) < 1.25 * of_reference
    assert distance("source") < 0.2 * of_reference
