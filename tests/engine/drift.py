"""Does the error of 4 bits grow along a prompt? `python -m tests.engine.drift FILE.json`.

Linear attention keeps one state for all tokens so far, so an error could add up in it. A tiny Qwen3.5 with linear
attention in two of three blocks, and a Mistral with full attention alone, are calibrated and served by vLLM in
bfloat16. The mean change of a token's log-probability by quantization is given for each part of the prompts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import machine, versions
from tests.engine.conftest import ENGINE, calibrate
from tests.engine.rows import REPOSITORY
from tests.tiny_conversations import write_calibration_data
from tests.tiny_decoders import build_tiny_decoder
from tests.tiny_media_models import build_tiny_qwen3_5

TOKENS, PART, PROMPTS = 8192, 1024, 4
# vLLM does not build a Qwen3.5 without linear attention.
MODELS: dict[str, Callable[[Path], Path]] = {
    "linear attention": partial(build_tiny_qwen3_5, max_position_embeddings=2 * TOKENS),
    "full attention": partial(
        build_tiny_decoder, "mistral", num_hidden_layers=3, sliding_window=None, max_position_embeddings=2 * TOKENS
    ),
}


def changes(directory: Path) -> dict[str, list[float]]:
    """For each model, the mean change of log-probabilities in each part of PART tokens."""
    data = write_calibration_data(directory / "data", "text")
    ids = torch.randint(20, 400, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {
        **ENGINE,
        "dtype": "bfloat16",
        "max_model_len": TOKENS + 64,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
    }
    jobs = []
    for name, build in MODELS.items():
        source = build(directory / name)
        for model in (source, calibrate(source, data, directory / f"{name}, 4 bits")):
            job = {"model": str(model), "prompts": [{"prompt_token_ids": prompt} for prompt in ids], "max_tokens": 1}
            jobs.append({**job, "engine": settings, "output": str(directory / f"{model.name}.json")})
    (directory / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.engine.driver", str(directory / "jobs.json")]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
    found = {}
    for name in MODELS:
        sixteen_bit, four_bit = (logprobs(directory / f"{model}.json") for model in (name, f"{name}, 4 bits"))
        found[name] = [float(part.mean()) for part in (four_bit - sixteen_bit).abs().split(PART, dim=1)]
    return found


def logprobs(file: Path) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, [prompts, TOKENS - 1]."""
    return torch.tensor([request["prompt_logprobs"] for request in json.loads(file.read_text())["requests"]])


def main() -> None:
    """Measure, print a line for each part, write the file."""
    with tempfile.TemporaryDirectory() as directory:
        found = changes(Path(directory))
    result: dict[str, Any] = {
        "command": "python -m tests.engine.drift",
        "machine": machine(),
        "versions": versions(),
        "tokens": TOKENS,
        "part": PART,
        "prompts": PROMPTS,
        "mean change of log-probability": found,
    }
    for part, values in enumerate(zip(*found.values(), strict=True)):
        shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(found, values, strict=True))
        print(f"tokens {part * PART} to {(part + 1) * PART - 1}: {shown}")
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
