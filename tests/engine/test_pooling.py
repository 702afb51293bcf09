"""Embedding and reward models: vLLM's vectors are those of the model whose linears are the torch reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, Qwen2ForSequenceClassification, Qwen2Model

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests import tiny_models
from tests.engine.conftest import ENGINE, TEXT_PROMPT
from tests.engine.jobs import run_jobs
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import write_calibration_data
from tests.tiny_embedders import build_tiny_embedder

pytestmark = pytest.mark.full

# The token that ends a step, whose scores a reward model of steps gives.
STEP = 25
PROMPTS = [TEXT_PROMPT, [*range(100, 130), STEP, *range(130, 150), STEP]]
# A code at a tie moves one value of a vector by a few percents of the vector's size.
TIED = 0.05
# The cosine of a checkpoint's vector and its source's; random weights lose more in 4 bit than trained ones.
NEAR = 0.95
# The task of a model that is not named after it.
TASKS = {"pooled": "embed"}


def build_process_reward_model(directory: Path) -> Path:
    """A Qwen2 with two scores a token, whose class is remote code outside vLLM, as in Qwen2.5-Math-PRM-7B."""
    source = tiny_models.build_tiny_qwen2(directory)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    for name, *shape in (("score.0", 128, 128), ("score.2", 2, 128)):
        tensors[f"{name}.weight"] = torch.randn(*shape, generator=generator).bfloat16() / 11
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    remote = {"architectures": ["Qwen2ForProcessRewardModel"], "auto_map": {"AutoModel": "code.Qwen2Model"}}
    (source / "config.json").write_text(json.dumps({**config, **remote}))
    return source


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by the task they are for: embedding models without and with pooling, reward models of texts and steps."""
    directory = tmp_path_factory.mktemp("pooling")
    return {
        "embed": tiny_models.build_tiny_qwen3(directory / "embed"),
        "pooled": build_tiny_embedder(directory / "pooled"),
        "classify": tiny_models.build_tiny_reward_model(directory / "classify"),
        "token_classify": build_process_reward_model(directory / "token_classify"),
    }


@pytest.fixture(scope="module")
def vectors(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """The vectors of PROMPTS by model; "16 bit" are those of the source of "pooled"."""
    directory = tmp_path_factory.mktemp("pooled")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    jobs = {}
    for name, source in sources.items():
        calibrate(source, data, source.with_name(f"{name} checkpoint"), recipe=recipe)
        job = {"model": str(source.with_name(f"{name} checkpoint")), "task": TASKS.get(name, name), "engine": ENGINE}
        if name == "token_classify":
            job["engine"] = {**ENGINE, "pooler_config": {"step_tag_id": STEP, "returned_token_ids": [0, 1]}}
        jobs[name] = {**job, "prompts": PROMPTS}
    jobs["16 bit"] = {**jobs["pooled"], "model": str(sources["pooled"])}
    results, _ = run_jobs("driver_pooling", jobs, directory, timeout=300)
    return {name: [torch.tensor(vector) for vector in found] for name, found in results.items()}


@torch.no_grad()
def test_embeddings_are_the_references(sources: dict[str, Path], vectors: dict[str, list[torch.Tensor]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(sources["embed"], dtype=torch.float32)
    swap_linears(model, Checkpoint(sources["embed"].with_name("embed checkpoint")))
    for tokens, vector in zip(PROMPTS, vectors["embed"], strict=True):
        expected = model.model(torch.tensor([tokens])).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, expected / expected.norm(), atol=TIED, rtol=0)


@torch.no_grad()
def test_pooled_embeddings_are_the_references_and_near_the_16_bit_models(
    sources: dict[str, Path], vectors: dict[str, list[torch.Tensor]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(sources["pooled"], dtype=torch.float32)
    swap_linears(model, Checkpoint(sources["pooled"].with_name("pooled checkpoint")))
    projection = load_file(sources["pooled"] / "2_Dense" / "model.safetensors")["linear.weight"]
    for tokens, vector, plain in zip(PROMPTS, vectors["pooled"], vectors["16 bit"], strict=True):
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        mean, last = projection @ hidden.mean(0), projection @ hidden[-1]
        torch.testing.assert_close(vector, mean / mean.norm(), atol=TIED, rtol=0)
        assert cosine_similarity(vector, plain, dim=0) > NEAR
        assert cosine_similarity(vector, last, dim=0) < NEAR, "the last token's vector is another"


@torch.no_grad()
def test_rewards_are_the_references(sources: dict[str, Path], vectors: dict[str, list[torch.Tensor]]) -> None:
    model = Qwen2ForSequenceClassification.from_pretrained(sources["classify"], dtype=torch.float32)
    swap_linears(model, Checkpoint(sources["classify"].with_name("classify checkpoint")))
    expected = torch.stack([model(torch.tensor([tokens])).logits[0] for tokens in PROMPTS])
    torch.testing.assert_close(
        torch.stack(vectors["classify"]), expected, atol=TIED * float(expected.abs().max()), rtol=0
    )
    assert float((expected[0] - expected[1]).abs()) > 10 * TIED, "two prompts, two rewards"


@torch.no_grad()
def test_rewards_of_steps_are_the_references(sources: dict[str, Path], vectors: dict[str, list[torch.Tensor]]) -> None:
    source = sources["token_classify"]
    model = Qwen2Model.from_pretrained(source, dtype=torch.float32)
    swap_linears(model, Checkpoint(source.with_name("token_classify checkpoint")), "model.")
    (file,) = source.glob("*.safetensors")
    head = {name: tensor.float() for name, tensor in load_file(file).items() if name.startswith("score.")}
    for tokens, found in zip(PROMPTS, vectors["token_classify"], strict=True):
        hidden = model(torch.tensor([tokens])).last_hidden_state[0]
        middle = (hidden @ head["score.0.weight"].T + head["score.0.bias"]).relu()
        expected = (middle @ head["score.2.weight"].T + head["score.2.bias"])[torch.tensor(tokens) == STEP]
        torch.testing.assert_close(found, expected, atol=TIED * float(expected.abs().max()), rtol=0)
