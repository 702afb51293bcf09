"""Speculative decoding of a quantized checkpoint: n-grams, a 16-bit draft, EAGLE and MTP heads change no answer.

A MorphoQuant draft, of a 16-bit and of a quantized model, is in `test_whole`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines
from tests.tiny_conversations import write_calibration_data
from tests.tiny_models import build_tiny_qwen2

pytestmark = pytest.mark.full

# A prompt that repeats itself, so that its n-grams foretell something.
PROMPTS = [{"prompt_token_ids": TEXT_PROMPT[:8] * 6}, {"prompt_token_ids": list(range(100, 130))}]
DRAFTS: dict[str, dict[str, Any]] = {
    "16-bit draft": {"method": "draft_model", "num_speculative_tokens": 2},
    "EAGLE head": {"method": "eagle", "num_speculative_tokens": 2},
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
}
MTP = {"method": "mtp", "num_speculative_tokens": 1}


def write_eagle_head(source: Path, directory: Path) -> Path:
    """An EAGLE head of a tiny Llama: its last block on the hidden states alone, without its first norm."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    head = {"num_hidden_layers": 1, "architectures": ["EagleLlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config | head))
    (file,) = source.glob("*.safetensors")
    prefix = f"model.layers.{config['num_hidden_layers'] - 1}."
    tensors = {
        name.replace(prefix, "layers.0."): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(prefix) and "input_layernorm" not in name
    }
    # Of the embedding and the hidden state side by side, it takes the second half.
    width = config["hidden_size"]
    tensors["fc.weight"] = torch.cat((torch.zeros(width, width), torch.eye(width)), 1).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def build_with_mtp_head(directory: Path) -> Path:
    """A tiny Qwen2 that vLLM serves as MiMo: one MTP layer more, which is the last block on the hidden states alone."""
    source = build_tiny_qwen2(directory)
    config = json.loads((source / "config.json").read_text())
    changes = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config | changes))
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    last, head, width = f"model.layers.{config['num_hidden_layers'] - 1}.", "model.mtp_layers.0.", config["hidden_size"]
    tensors |= {name.replace(last, head): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        tensors[f"{head}{norm}.weight"] = tensors["model.norm.weight"].clone()
    # Of the hidden state and the embedding side by side, it takes the first half.
    tensors[f"{head}input_proj.weight"] = torch.cat((torch.eye(width), torch.zeros(width, width)), 1).bfloat16()
    save_file(tensors, file, {"format": "pt"})
    return source


@pytest.fixture(scope="module")
def served(llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("speculation")
    data = write_calibration_data(directory / "data", "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(llama_source, data, directory / "checkpoint", recipe=recipe)
    jobs = {"alone": ENGINE}
    models = {"16-bit draft": llama_source, "EAGLE head": write_eagle_head(llama_source, directory / "eagle")}
    for name, settings in DRAFTS.items():
        model = {"model": str(models[name])} if name in models else {}
        jobs[name] = {**ENGINE, "speculative_config": {**settings, **model}, "disable_log_stats": False}
    calibrate(build_with_mtp_head(directory / "mtp"), data, directory / "mtp checkpoint", recipe=recipe)
    # vLLM loads numba for n-grams, after which a draft's engine does not start in the same process: they come last.
    jobs = {
        "MTP head alone": ENGINE,
        "MTP head": {**ENGINE, "speculative_config": MTP, "disable_log_stats": False},
    } | jobs
    engines = Engines(directory)
    engines.run(
        {
            name: {
                "model": str(directory / ("mtp checkpoint" if name.startswith("MTP") else "checkpoint")),
                "prompts": PROMPTS,
                "max_tokens": 24,
                "engine": engine,
            }
            for name, engine in jobs.items()
        }
    )
    return engines.results


def answers(result: dict[str, Any]) -> list[list[int]]:
    assert "error" not in result, result["error"]
    return [request["token_ids"] for request in result["requests"]]


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_changes_no_answer(served: dict[str, dict[str, Any]], name: str) -> None:
    assert answers(served[name]) == answers(served["alone"]) and served[name]["drafted"] > 0


def test_an_mtp_head_that_calibration_carried_changes_no_answer(served: dict[str, dict[str, Any]]) -> None:
    """vLLM takes its tensors from the checkpoint: the plugin refuses one that leaves a weight of the head unloaded."""
    assert answers(served["MTP head"]) == answers(served["MTP head alone"]) and served["MTP head"]["drafted"] > 0


def test_the_source_drafts_for_its_checkpoint(served: dict[str, dict[str, Any]]) -> None:
    assert served["16-bit draft"]["accepted"] > 0
