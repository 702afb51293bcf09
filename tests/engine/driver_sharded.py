"""Runs vLLM engines that save their state, or load a saved one: `python -m tests.engine.driver_sharded JOBS.json`.

Each job names a directory and a prompt's tokens. With `save` the engine's state goes there, and the checkpoint's files
other than weights beside it, as in vLLM's example. The result holds the log probabilities of the prompt's tokens, or
the last line of the error that ended the job.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.engine.driver import main


def save(llm: Any, source: Path, directory: Path) -> None:
    """Save the state of an engine that serves `source`."""
    directory.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, directory)
    llm.collective_rpc("save_sharded_state", kwargs={"path": str(directory)})


def run(job: dict[str, Any]) -> None:
    """Start one engine, ask it, save its state."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    result: list[float] | str
    llm = None
    try:
        llm = LLM(job["model"], **job["engine"])
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": job["tokens"]}], sampling, use_tqdm=False)
        chosen = zip(output.prompt_logprobs[1:], job["tokens"][1:], strict=True)
        result = [entry[token].logprob for entry, token in chosen]
        if "save" in job:
            save(llm, Path(job["model"]), Path(job["save"]))
        if "reload" in job:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
    except Exception as error:
        # Whatever ends the job is the result: the test looks at its message.
        result = str(error).strip().splitlines()[-1]
    Path(job["output"]).write_text(json.dumps(result))
    del llm
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(run)
