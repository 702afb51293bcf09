"""Runs vLLM engines that load weights again: `python -m tests.engine.driver_reload JOBS.json`.

Each job names a checkpoint and the directories that are loaded after it. The result holds, for each of them in turn,
the log probabilities of a prompt's tokens, or the last line of the error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.driver import main


def run(job: dict[str, Any]) -> None:
    """Start one engine, ask it, load the next weights, ask it again."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(job["model"], **job["engine"])
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    results: list[Any] = []
    for directory in [None, *job["reloads"]]:
        if directory is not None:
            try:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
            except Exception as error:
                # Whatever the worker raises is the result: the test looks at its message.
                results.append(str(error).strip().splitlines()[-1])
                break
            llm.reset_prefix_cache()
        (output,) = llm.generate([{"prompt_token_ids": job["tokens"]}], sampling, use_tqdm=False)
        chosen = zip(output.prompt_logprobs[1:], job["tokens"][1:], strict=True)
        results.append([entry[token].logprob for entry, token in chosen])
    Path(job["output"]).write_text(json.dumps(results))
    del llm
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(run)
