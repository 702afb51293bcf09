"""lm-eval's command line run in this process, and the expected values of its logged log likelihoods."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
TASKS = ("tiny_places", "tiny_continuation")


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    """`lm_eval run ARGUMENTS` on the tasks of tests/data/lm_eval; its results, and samples by task."""
    # Read when lm-eval and datasets are first imported; the task names its file from the repository's root.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(output / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(REPOSITORY)
    from lm_eval.__main__ import cli_evaluate

    tasks = ["--tasks", ",".join(TASKS), "--include_path", "tests/data/lm_eval"]
    logged = ["--output_path", str(output), "--log_samples", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *arguments, *tasks, *logged])
    cli_evaluate()
    (results,) = output.glob("*/results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())
    found["samples"] = {
        task: [json.loads(line) for line in next(output.glob(f"*/samples_{task}_*.jsonl")).read_text().splitlines()]
        for task in TASKS
    }
    return found


@torch.no_grad()
def log_likelihood(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> float:
    """Log likelihood of a continuation by the model itself: the sum over its tokens."""
    prompt = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = torch.tensor([tokenizer(context + continuation, add_special_tokens=False)["input_ids"]])
    found = model(whole).logits[0].log_softmax(-1)
    chosen = found[:-1].gather(1, whole[0, 1:, None]).flatten()
    return float(chosen[len(prompt) - 1 :].sum())


def assert_logged(results: dict[str, Any], model: nn.Module, tokenizer: Any, tolerance: float) -> None:
    """Every choice's logged log likelihood is the model's, and the accuracy is that of the likeliest choices."""
    samples = results["samples"]["tiny_places"]
    assert len(samples) == 4
    right = 0
    for sample in samples:
        likelihoods = []
        for request, response in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            expected = log_likelihood(model, tokenizer, request["arg_0"], request["arg_1"])
            assert float(response[0]) == pytest.approx(expected, abs=tolerance)
            likelihoods.append(expected)
        right += likelihoods.index(max(likelihoods)) == sample["doc"]["answer"]
    assert results["results"]["tiny_places"]["acc,none"] == right / len(samples)
    assert len(results["samples"]["tiny_continuation"]) == 4
    assert results["results"]["tiny_continuation"]["exact_match,none"] == 0.0, "a random model that knows the answer?"
