"""transformers' reload of a checkpoint against vLLM's engine that serves it, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from morphoquant_vllm.hf import MorphoQuantLinear
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.linear import linear, output_bound
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import TEXT_PROMPT, Engines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reloaded(omni_checkpoint: Path) -> nn.Module:
    """On the kernels, as the engine. Each linear's outputs are compared with the definition's for the same inputs.

    Whole passes are not: of two values at a tie between codes each may go another way, and later layers add to that.
    """
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(omni_checkpoint, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, MorphoQuantLinear):
            module.register_forward_hook(assert_within_the_bound)
    return model


def assert_within_the_bound(module: MorphoQuantLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """The kernel's outputs are the reference's for these inputs, within the documented bound."""
    x, y = inputs[0].flatten(0, -2), output.flatten(0, -2).double()
    given, record, weight = module.modality_of(x), module.activation(), module.weights()
    rows = token_rows(x, given, record)
    expected = linear(x, given, weight, record)
    bound = output_bound(act_quant(x, rows, record), rows, weight, record.gain, expected)
    if module.bias is not None:
        # Its sum is rounded to float32 once more.
        y, bound = y - module.bias.double(), bound + y.abs() * torch.finfo(torch.float32).eps
    assert bool(((y - expected.double()).abs() <= bound).all()), module.name


def request_of(engines: Engines, index: int) -> dict[str, Any]:
    return engines.results["eager"]["requests"][index]


def assert_served(model: nn.Module, inputs: dict[str, Tensor], request: dict[str, Any]) -> None:
    """Log probabilities of the prompt, and of the generated tokens, are the served ones."""
    assert inputs["input_ids"][0].tolist() == request["prompt_token_ids"]
    tokens = torch.tensor(request["prompt_token_ids"] + request["token_ids"])
    extended = {**inputs, "input_ids": tokens[None], "attention_mask": torch.ones_like(tokens[None])}
    with torch.no_grad():
        found = model(**extended).logits[0].log_softmax(-1)
    chosen = found[:-1].gather(1, tokens[1:, None]).flatten()
    served = torch.tensor(request["prompt_logprobs"] + request["logprobs"])
    assert_same_logprobs(chosen, served)


def test_text(reloaded: nn.Module, engines: Engines) -> None:
    assert_served(reloaded, {"input_ids": torch.tensor([TEXT_PROMPT])}, request_of(engines, 0))


def test_image_and_audio(
    reloaded: nn.Module, engines: Engines, omni_checkpoint: Path, media: dict[str, Path], media_text: str
) -> None:
    inputs = AutoProcessor.from_pretrained(omni_checkpoint)(
        text=[media_text],
        images=[Image.open(media["image"]).convert("RGB")],
        audio=[soundfile.read(media["audio"], dtype="float32")[0]],
        return_tensors="pt",
    )
    assert_served(reloaded, dict(inputs), request_of(engines, 1))
