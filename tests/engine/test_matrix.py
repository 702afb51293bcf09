"""The long matrix: every architecture, group size, dtype and rank count, served against the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests import tiny_models
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines, calibrate
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import write_calibration_data

pytestmark = [pytest.mark.slow, pytest.mark.full]

# name: (builder, data, loader, prefix of stored names, prefix of module names)
MODELS: dict[str, tuple[Any, str, Any, str, str]] = {
    "llama": (tiny_models.build_tiny_llama, "text", AutoModelForCausalLM, "", ""),
    "qwen3": (tiny_models.build_tiny_qwen3, "text", AutoModelForCausalLM, "", ""),
    "qwen2_5_vl": (
        tiny_models.build_tiny_qwen2_5_vl,
        "vl",
        AutoModelForImageTextToText,
        "model.",
        "model.language_model.",
    ),
}
# (group_size, engine settings); K / 2 = 64 of o_proj leaves no whole group of 128 to each of two ranks.
MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "G32": (32, {}),
    "G64": (64, {}),
    "G128": (128, {}),
    "G64 compiled": (64, {"enforce_eager": False}),
    "G32 two ranks": (32, {"tensor_parallel_size": 2}),
    "G64 two ranks compiled": (64, {"tensor_parallel_size": 2, "enforce_eager": False}),
    "G32 bfloat16": (32, {"dtype": "bfloat16"}),
    "G32 float16 two ranks": (32, {"dtype": "float16", "tensor_parallel_size": 2}),
}
# Another order of float32 sums (as in test_serve); 16-bit engines round every layer's output and with it flip codes.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0, "float16": 0.5}


@pytest.fixture(scope="module", params=sorted(MODELS))
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict, Engines]:
    build, kind, *_ = MODELS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    source = build(directory / "source")
    data = write_calibration_data(directory / "data", kind)
    checkpoints = {
        size: calibrate(source, data, directory / f"G{size}", "--group-size", str(size)) for size in (32, 64, 128)
    }
    started = Engines(directory)
    started.run(
        {
            mode: {
                "model": str(checkpoints[size]),
                "prompts": [{"prompt_token_ids": TEXT_PROMPT}],
                "engine": {**ENGINE, **settings},
            }
            for mode, (size, settings) in MODES.items()
        },
        timeout=1200,
    )
    return request.param, source, checkpoints, started


@pytest.mark.parametrize("mode", list(MODES))
def test_served_logprobs_are_the_reference_models(matrix: tuple[str, Path, dict, Engines], mode: str) -> None:
    name, source, checkpoints, started = matrix
    _, _, loader, stored, module = MODELS[name]
    size, settings = MODES[mode]
    model = loader.from_pretrained(source, dtype=torch.float32)
    model = swap_linears(model, Checkpoint(checkpoints[size]), stored, module)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([TEXT_PROMPT])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(TEXT_PROMPT[1:])[:, None]).flatten()
    served = torch.tensor(started.results[mode]["requests"][0]["prompt_logprobs"])
    gap = (served - expected).abs()
    dtype = settings.get("dtype", "float32")
    # One flipped code may move a position in 16 bit; the typical one must be near.
    assert float(gap.max() if dtype == "float32" else gap.median()) <= TOLERANCE[dtype]
