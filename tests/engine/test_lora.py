"""LoRA adapters by request on quantized checkpoints: each answer is that of the reference with the adapter in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests.adapters import adapt, write_adapter
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import ENGINE, TEXT_PROMPT
from tests.engine.jobs import run_jobs
from tests.reference_model import Checkpoint, reference_thinker, swap_linears
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full

PROMPTS = [
    {"tokens": tokens, "adapter": adapter}
    for tokens in (TEXT_PROMPT, list(range(100, 130)))
    for adapter in (None, "all linears", "q and down")
]


@pytest.fixture(scope="module")
def llama_checkpoint(llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("lora llama")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(llama_source, data, directory / "checkpoint", recipe=recipe)
    return Checkpoint(directory / "checkpoint")


def adapters(checkpoint: Checkpoint, directory: Path) -> dict[str, Path]:
    """Two adapters made for the source model, by name: of all linears, and of two whose channels might be reordered."""
    layers = {name: (layer.in_features, layer.out_features) for name, layer in checkpoint.spec.layers.items()}
    return {
        "all linears": write_adapter(directory / "all linears", layers),
        "q and down": write_adapter(directory / "q and down", layers, ("q_proj", "down_proj")),
    }


@pytest.fixture(scope="module")
def served(
    llama_checkpoint: Checkpoint, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Log probabilities of PROMPTS, and the adapters, by the name of the model."""
    directory = tmp_path_factory.mktemp("lora")
    models = {"llama": llama_checkpoint, "omni": checkpoint}
    made = {name: adapters(model, directory / name) for name, model in models.items()}
    jobs = {
        name: {
            "model": str(model.directory),
            # On a CPU vLLM gives a request without an adapter that of the last place, so one more stays empty.
            "engine": {**ENGINE, "max_loras": 3, "max_lora_rank": 8},
            "adapters": {adapter: str(path) for adapter, path in made[name].items()},
            "prompts": PROMPTS,
        }
        for name, model in models.items()
    }
    found, log = run_jobs("driver_lora", jobs, directory, timeout=400)
    return found | {"made": made, "log": log}


@torch.no_grad()
def assert_each_is_the_adapted_references(
    plain: nn.Module, found: list[dict[str, Any]], made: dict[str, Path], stored_prefix: str = ""
) -> None:
    # vLLM gives no log probabilities of prompts with LoRA on a CPU: those of the answers are compared.
    models = {None: plain}
    models |= {name: adapt(copy.deepcopy(plain), path, stored_prefix) for name, path in made.items()}
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = torch.tensor([prompt["tokens"] + answer["tokens"]])
        chosen = {}
        for name, model in models.items():
            logprobs = model(tokens).logits[0].log_softmax(-1)[len(prompt["tokens"]) - 1 : -1]
            chosen[name] = logprobs.gather(1, torch.tensor(answer["tokens"])[:, None]).flatten()
        assert_same_logprobs(torch.tensor(answer["logprobs"]), chosen[prompt["adapter"]])
        # Adapters that change little would prove nothing.
        others = [values for name, values in chosen.items() if name != prompt["adapter"]]
        assert all(float((values - chosen[prompt["adapter"]]).abs().mean()) > 0.1 for values in others)


def test_two_adapters_in_one_batch_are_those_of_the_source(
    served: dict[str, Any], llama_checkpoint: Checkpoint, llama_source: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_source, dtype=torch.float32)
    plain = swap_linears(model, llama_checkpoint)
    assert_each_is_the_adapted_references(plain, served["llama"], served["made"]["llama"])


def test_adapters_of_the_omni_thinker_are_served_with_row_any(
    served: dict[str, Any], checkpoint: Checkpoint, omni_source: Path
) -> None:
    plain = reference_thinker(omni_source, checkpoint, by_modality=False)
    assert_each_is_the_adapted_references(plain, served["omni"], served["made"]["omni"], "thinker.")
    assert "row 'any' quantizes the tokens of every modality (LoRA: its embedding bypasses the hook)" in served["log"]
