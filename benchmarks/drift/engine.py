"""Log probabilities of prompts' tokens by engines: `python -m benchmarks.drift.engine JOBS.json` runs them in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError


def logprobs(
    engines: Mapping[str, tuple[Path, dict[str, Any]]], prompts: Sequence[Sequence[int]]
) -> dict[str, list[float]]:
    """By engine, a model and its settings, the log probability of every token but the first of each prompt.

    All engines run in one process, which loads vLLM once.
    """
    cores = sorted(os.sched_getaffinity(0))
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # Two ranks on one NUMA node need their cores named.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}"),
    }
    with tempfile.TemporaryDirectory() as directory:
        jobs, output = Path(directory) / "jobs.json", Path(directory) / "output.json"
        described = {name: {"model": str(model), "settings": settings} for name, (model, settings) in engines.items()}
        jobs.write_text(json.dumps({"engines": described, "prompts": prompts, "output": str(output)}))
        command = [sys.executable, "-m", "benchmarks.drift.engine", str(jobs)]
        done = subprocess.run(command, env={**os.environ, **variables}, stdout=sys.stderr)
        if done.returncode:
            raise MorphoQuantError("an engine ended, see its lines above")
        found: dict[str, list[float]] = json.loads(output.read_text())
    return found


def ask(model: str, settings: dict[str, Any], prompts: Sequence[Sequence[int]]) -> list[float]:
    """The log probabilities of one engine, which is gone afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model, enable_prefix_caching=False, **settings)
    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    found = [
        entry[token].logprob
        for output, tokens in zip(outputs, prompts, strict=True)
        for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
    ]
    del llm
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    """Run the engines of a file of jobs, and write their log probabilities."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found = {name: ask(**engine, prompts=jobs["prompts"]) for name, engine in jobs["engines"].items()}
    Path(jobs["output"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
