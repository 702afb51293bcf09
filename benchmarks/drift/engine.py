"""Log probabilities of prompts' tokens by one engine: `python -m benchmarks.drift.engine JOB.json` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError


def logprobs(model: Path, settings: dict[str, Any], prompts: Sequence[Sequence[int]]) -> list[float]:
    """The log probability of every token but the first of each prompt, one after another."""
    cores = sorted(os.sched_getaffinity(0))
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # Two ranks on one NUMA node need their cores named.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}"),
    }
    with tempfile.TemporaryDirectory() as directory:
        job, output = Path(directory) / "job.json", Path(directory) / "output.json"
        job.write_text(
            json.dumps({"model": str(model), "settings": settings, "prompts": prompts, "output": str(output)})
        )
        command = [sys.executable, "-m", "benchmarks.drift.engine", str(job)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
        if done.returncode:
            raise MorphoQuantError(f"{model}: the engine ended: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        found: list[float] = json.loads(output.read_text())
    return found


def main() -> None:
    """Run the engine of a job, and write its log probabilities."""
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(job["model"], enable_prefix_caching=False, **job["settings"])
    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in job["prompts"]],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    found = [
        entry[token].logprob
        for output, tokens in zip(outputs, job["prompts"], strict=True)
        for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
    ]
    Path(job["output"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
