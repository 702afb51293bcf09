"""Architectures of tests/tiny_decoders.py: calibrated by the console command, served, and loaded by transformers.

Those that calibration does not list go through the generic path. The one of the default tests has biases and an MLP
without a gate, and runs in vLLM's Transformers backend.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import morphoquant_vllm.hf
from calibration.model.architectures import known_architecture
from calibration.model.discovery import GENERIC
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines, calibrate, command
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import write_calibration_data
from tests.tiny_decoders import DECODERS, build_tiny_decoder

pytestmark = pytest.mark.slow

DEFAULT = ("starcoder2",)
OTHERS = [name for name in DECODERS if name not in DEFAULT]
# Engines of one process.
PART = 11
# Another order of float32 sums, as in test_matrix.
TOLERANCE = 1e-3


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(DEFAULT, id="default"),
        *(
            pytest.param(OTHERS[first : first + PART], id=f"from {OTHERS[first]}", marks=pytest.mark.full)
            for first in range(0, len(OTHERS), PART)
        ),
    ],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engines]:
    """Checkpoints `NAME` of models `NAME-source`, and an engine of each."""
    directory = tmp_path_factory.mktemp("architectures")
    data = write_calibration_data(directory / "data", "text")
    for name in request.param:
        calibrate(build_tiny_decoder(name, directory / f"{name}-source"), data, directory / name)
    engines = Engines(directory)
    prompts = [{"prompt_token_ids": TEXT_PROMPT}]
    engines.run(
        {name: {"model": str(directory / name), "prompts": prompts, "engine": ENGINE} for name in request.param},
        timeout=1800,
    )
    return directory, engines


def prompt_logprobs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([TEXT_PROMPT])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(TEXT_PROMPT[1:])[:, None]).flatten()


def test_served_and_reloaded_logprobs_are_the_reference_models(served: tuple[Path, Engines]) -> None:
    directory, engines = served
    for name, result in engines.results.items():
        # Gemma 2 caps the scores of its attention; only plain attention does so in transformers.
        plain = {"dtype": torch.float32, "attn_implementation": "eager"}
        source = AutoModelForCausalLM.from_pretrained(directory / f"{name}-source", **plain)
        sixteen_bit = prompt_logprobs(source)
        expected = prompt_logprobs(swap_linears(source, Checkpoint(directory / name)))
        reload = AutoModelForCausalLM.from_pretrained(directory / name, **plain)
        morphoquant_vllm.hf.configure(reload, reference=True)
        reloaded = prompt_logprobs(reload)
        assert "error" not in result, f"{name}: {result['error']}"
        found = torch.tensor(result["requests"][0]["prompt_logprobs"])
        differences = {"served": found - expected, "reloaded": reloaded - expected}
        largest = {way: float(difference.abs().max()) for way, difference in differences.items()}
        print(f"{name}: largest difference of log-probabilities {largest}")
        assert max(largest.values()) < TOLERANCE, name
        # A prompt on which 4 bits change nothing would show nothing.
        assert float((sixteen_bit - expected).abs().max()) > 100 * TOLERANCE, name


@pytest.mark.full
def test_two_ranks_serve_what_the_generic_path_made(tmp_path: Path) -> None:
    """Phi-3's files hold fused matrices, which ranks cut by vLLM's shards."""
    names = ("phi3",)
    data = write_calibration_data(tmp_path / "data", "text")
    for name in names:
        calibrate(build_tiny_decoder(name, tmp_path / f"{name}-source"), data, tmp_path / name)
    engines = Engines(tmp_path)
    job = {"prompts": [{"prompt_token_ids": TEXT_PROMPT}], "engine": {**ENGINE, "tensor_parallel_size": 2}}
    engines.run({name: {**job, "model": str(tmp_path / name)} for name in names})
    for name, result in engines.results.items():
        assert "error" not in result, f"{name}: {result['error']}"
        source = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-source", dtype=torch.float32)
        expected = prompt_logprobs(swap_linears(source, Checkpoint(tmp_path / name)))
        found = torch.tensor(result["requests"][0]["prompt_logprobs"])
        largest = float((found - expected).abs().max())
        print(f"{name} on two ranks: largest difference of log-probabilities {largest}")
        assert largest < TOLERANCE, name


@pytest.mark.full
def test_a_model_of_which_vllm_builds_more_than_the_files_hold_is_refused(tmp_path: Path) -> None:
    """vLLM's StableLM has a second norm in each block; the source with parallel residuals has none."""
    source = build_tiny_decoder("stablelm", tmp_path / "source", use_parallel_residual=True)
    calibrate(source, write_calibration_data(tmp_path / "data", "text"), tmp_path / "parallel")
    engines = Engines(tmp_path)
    job = {"model": str(tmp_path / "parallel"), "prompts": [{"prompt_token_ids": TEXT_PROMPT}], "engine": ENGINE}
    engines.run({"parallel": job})
    refusal = engines.results["parallel"]["error"][0]
    assert "StablelmForCausalLM has weights that the checkpoint does not hold" in refusal
    assert "post_attention_layernorm" in refusal


def test_every_linear_of_the_decoder_is_quantized(served: tuple[Path, Engines]) -> None:
    directory, engines = served
    for name, result in engines.results.items():
        # Those of blocks, which are numbered.
        methods = {method for layer, method in result["methods"].items() if re.search(r"\.\d+\.", layer)}
        assert {method for method in methods if "Linear" in method} == {"MorphoQuantLinearMethod"}, name
        spec = Checkpoint(directory / name).spec
        stored = {re.split(r"\.\d+\.", layer, maxsplit=1)[1] for layer in spec.layers}
        assert len(stored) * DECODERS[name][1].get("num_hidden_layers", 2) == len(spec.layers), name


def test_the_generic_path_is_said(served: tuple[Path, Engines]) -> None:
    directory, engines = served
    for name in engines.results:
        verified = known_architecture(json.loads((directory / name / "config.json").read_text())) is not None
        line = [command("morphoquant"), "inspect", str(directory / name)]
        shown = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stdout
        assert (GENERIC in " ".join(shown.split())) is not verified, name
