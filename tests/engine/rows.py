"""Engines that record the row of every token: how they are run, and what their records and outputs must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import soundfile
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor

from tests.reference_model import Checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE, AUDIO, VIDEO = (
    f"<|{kind}_bos|><|{token}|><|{kind}_eos|>"
    for kind, token in (("vision", "IMAGE"), ("audio", "AUDIO"), ("vision", "VIDEO"))
)


# A step of 64 tokens is less than most prompts: they are prefilled in chunks, beside others that decode already.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 2, "audio": 2, "video": 1},
    # Few tokens of a picture; two seconds between pairs of frames, which puts sound between them.
    "mm_processor_kwargs": {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28, "fps": 1.0},
}


# Which of the prompts the reference model computes, too.
QUESTION = 1


def run_jobs(directory: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run engines one after another in a process of its own; what each recorded, and "log" of all of them."""
    lines = [{**job, "output": str(directory / f"{name}.json")} for name, job in jobs.items()]
    (directory / "jobs.json").write_text(json.dumps(lines))
    cores = sorted(os.sched_getaffinity(0))
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    log = directory / "engines.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine.driver_rows", str(directory / "jobs.json")],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1800,
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": threads},
        )
    text = log.read_text(errors="replace")
    assert done.returncode == 0, "\n".join(text.splitlines()[-60:])
    return {name: json.loads(Path(line["output"]).read_text()) for name, line in zip(jobs, lines, strict=True)} | {
        "log": text
    }


def without_log_probabilities(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """A pass that may use cached prefixes: vLLM computes log probabilities of a prompt only from its first token on."""
    return {"prompts": prompts}


def kinds_and_rows(result: dict[str, Any], spec_rows: tuple[str, ...]) -> list[tuple[list[str], list[str]]]:
    """What lies at each token of a step, and the row it was given; for every step of every rank."""
    return [
        ([kind for part in step["tokens"] for kind in part["kinds"]], [spec_rows[row] for row in step["rows"]])
        for worker in result["workers"]
        for step in worker["steps"]
    ]


def assert_every_token_has_its_row(result: dict[str, Any], spec_rows: tuple[str, ...], ranks: int = 1) -> None:
    assert len(result["workers"]) == ranks
    for worker in result["workers"]:
        assert worker["buffers"] == 1 and worker["layers"] == 8, "two blocks of four linears read one buffer"
    steps = kinds_and_rows(result, spec_rows)
    for kinds, rows in steps:
        assert rows == kinds
    # If prefixes are cached, the images are not computed again.
    assert {kind for kinds, _ in steps for kind in kinds} >= {"text", "video", "audio"}


def shape_of_steps(result: dict[str, Any]) -> Counter[str]:
    """How often a step was of a kind that could go wrong in its own way."""
    shapes: Counter[str] = Counter()
    for step in result["workers"][0]["steps"]:
        prefills = [part for part in step["tokens"] if part["first"] < part["prompt"]]
        decodes = len(step["tokens"]) - len(prefills)
        shapes["mixed"] += bool(prefills) and decodes > 0
        shapes["decode only"] += not prefills
        shapes["several requests with media"] += sum(set(part["kinds"]) != {"text"} for part in prefills) > 1
        for part in prefills:
            inside = part["kinds"][0] != "text" and part["first"] > 0
            shapes["chunk starts inside a medium"] += inside
            # Only if sound is interleaved with a video, no text lies between the two.
            shapes["interleaved"] += ("audio", "video") in pairwise(part["kinds"])
    return shapes


def reference_logprobs(model: nn.Module, source: Path, prompt: dict[str, Any]) -> torch.Tensor:
    """Log probability of every token of the prompt but the first."""
    media: dict[str, Any] = {"images": [Image.open(path).convert("RGB") for path in prompt["media"]["image"]]}
    if "audio" in prompt["media"]:
        media["audio"] = [soundfile.read(path, dtype="float32")[0] for path in prompt["media"]["audio"]]
    inputs = AutoProcessor.from_pretrained(source)(
        text=[prompt["prompt"]],
        **media,
        return_tensors="pt",
        min_pixels=ENGINE["mm_processor_kwargs"]["min_pixels"],
        max_pixels=ENGINE["mm_processor_kwargs"]["max_pixels"],
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, inputs["input_ids"][0, 1:, None]).flatten()


def served_logprobs(result: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(result["requests"][QUESTION]["prompt_logprobs"])


def spec_rows(checkpoint: Path) -> tuple[str, ...]:
    return Checkpoint(checkpoint).spec.rows
