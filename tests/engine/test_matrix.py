"""The long matrix: every architecture, group size, dtype and rank count, served against the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests import tiny_models
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines, calibrate
from tests.engine.layers import assert_layers_are_the_reference
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import write_calibration_data

pytestmark = [pytest.mark.slow, pytest.mark.full]

# name: (builder, data, loader, prefix of stored names, prefix of transformers' and of vLLM's module names)
MODELS: dict[str, tuple[Any, str, Any, str, str, str]] = {
    "llama": (tiny_models.build_tiny_llama, "text", AutoModelForCausalLM, "", "", ""),
    "qwen3": (tiny_models.build_tiny_qwen3, "text", AutoModelForCausalLM, "", "", ""),
    "qwen2_5_vl": (
        tiny_models.build_tiny_qwen2_5_vl,
        "vl",
        AutoModelForImageTextToText,
        "model.",
        "model.language_model.",
        "language_model.model.",
    ),
}
# Flags of calibration, by name of the checkpoint.
CHECKPOINTS = {
    "G32": ("--group-size", "32"),
    "G64": ("--group-size", "64"),
    "G128": ("--group-size", "128"),
    "two-level": ("--group-size", "32", "--scale-levels", "16"),
}
# (checkpoint, engine settings); K / 2 = 64 of o_proj leaves no whole group of 128 to each of two ranks.
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "G32": ("G32", {}),
    "G64": ("G64", {}),
    "G128": ("G128", {}),
    "G64 compiled": ("G64", {"enforce_eager": False}),
    "G32 two ranks": ("G32", {"tensor_parallel_size": 2}),
    "G64 two ranks compiled": ("G64", {"tensor_parallel_size": 2, "enforce_eager": False}),
    "two-level two ranks compiled": ("two-level", {"tensor_parallel_size": 2, "enforce_eager": False}),
}
# 16-bit engines round every layer's output, which flips codes: they are compared layer by layer, on captured inputs.
SIXTEEN_BIT_MODES = {
    "G32 bfloat16": ("G32", "bfloat16"),
    "G128 bfloat16": ("G128", "bfloat16"),
    "G64 float16": ("G64", "float16"),
    "two-level bfloat16": ("two-level", "bfloat16"),
}
# Another order of float32 sums, as in test_serve.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=sorted(MODELS))
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict, Engines]:
    build, kind, *_ = MODELS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    source = build(directory / "source")
    data = write_calibration_data(directory / "data", kind)
    checkpoints = {name: calibrate(source, data, directory / name, *flags) for name, flags in CHECKPOINTS.items()}
    schemes = {layer.scale_scheme for layer in Checkpoint(checkpoints["two-level"]).spec.layers.values()}
    assert schemes == {"two_level"}
    started = Engines(directory)
    prompts = [{"prompt_token_ids": TEXT_PROMPT}]
    jobs = {
        mode: {"model": str(checkpoints[made]), "prompts": prompts, "engine": {**ENGINE, **settings}}
        for mode, (made, settings) in MODES.items()
    }
    jobs |= {
        mode: {
            "model": str(checkpoints[made]),
            "prompts": prompts,
            "engine": {**ENGINE, "dtype": dtype},
            "capture": str(directory / f"{mode}.safetensors"),
        }
        for mode, (made, dtype) in SIXTEEN_BIT_MODES.items()
    }
    started.run(jobs, timeout=1200)
    return request.param, source, checkpoints, started


@pytest.mark.parametrize("mode", list(MODES))
def test_served_logprobs_are_the_reference_models(matrix: tuple[str, Path, dict, Engines], mode: str) -> None:
    name, source, checkpoints, started = matrix
    _, _, loader, stored, module, _ = MODELS[name]
    model = loader.from_pretrained(source, dtype=torch.float32)
    model = swap_linears(model, Checkpoint(checkpoints[MODES[mode][0]]), stored, module)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([TEXT_PROMPT])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(TEXT_PROMPT[1:])[:, None]).flatten()
    served = torch.tensor(started.results[mode]["requests"][0]["prompt_logprobs"])
    torch.testing.assert_close(served, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", list(SIXTEEN_BIT_MODES))
def test_sixteen_bit_layers_are_the_reference(matrix: tuple[str, Path, dict, Engines], mode: str) -> None:
    name, _, checkpoints, started = matrix
    made, dtype = SIXTEEN_BIT_MODES[mode]
    prefix = (MODELS[name][5], MODELS[name][3])
    assert_layers_are_the_reference(started.results[mode], Checkpoint(checkpoints[made]), getattr(torch, dtype), prefix)
