"""Runs vLLM's pooling engines one after another: `python -m tests.engine.driver_pooling JOBS.json`.

Each job names a checkpoint, a task ("embed", "classify", "token_classify"), prompts as token ids, and the file for
their vectors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.driver import main


def run(job: dict[str, Any]) -> None:
    """Start one engine, pool its prompts, write the vectors."""
    from vllm import LLM, PoolingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(job["model"], runner="pooling", **job["engine"])
    scores = PoolingParams(use_activation=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    if job["task"] == "embed":
        vectors = [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]
    elif job["task"] == "classify":
        vectors = [output.outputs.probs for output in llm.classify(prompts, pooling_params=scores, use_tqdm=False)]
    else:
        outputs = llm.encode(prompts, pooling_params=scores, pooling_task=job["task"], use_tqdm=False)
        vectors = [output.outputs.data.tolist() for output in outputs]
    Path(job["output"]).write_text(json.dumps(vectors))
    del llm
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(run)
