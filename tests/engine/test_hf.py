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

import morphoquant_vllm.hf
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import TEXT_PROMPT, Engines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[True, False], ids=["reference", "kernels"])
def reloaded(request: pytest.FixtureRequest, omni_checkpoint: Path) -> nn.Module:
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(omni_checkpoint, dtype=torch.float32)
    # The engine runs the kernels; the definition is compared with them, and the kernels with themselves.
    morphoquant_vllm.hf.configure(model, reference=request.param)
    return model


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
