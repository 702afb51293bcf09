"""Runs vLLM engines with LoRA adapters one after another: `python -m tests.engine.driver_lora JOBS.json`.

Each job names a checkpoint, adapters by name, and prompts, each with the name of its adapter or none. All prompts are
sent at once. The result holds the tokens of each answer and their log probabilities.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.driver import main


def run(job: dict[str, Any]) -> None:
    """Start one engine, ask it each prompt with its adapter, write the results."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    llm = LLM(job["model"], enable_lora=True, **job["engine"])
    requests = {
        name: LoRARequest(name, index, path) for index, (name, path) in enumerate(job["adapters"].items(), start=1)
    }
    outputs = llm.generate(
        [{"prompt_token_ids": prompt["tokens"]} for prompt in job["prompts"]],
        SamplingParams(max_tokens=16, temperature=0, logprobs=0, ignore_eos=True),
        lora_request=[requests.get(prompt["adapter"]) for prompt in job["prompts"]],
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    results = [
        {
            "tokens": list(answer.token_ids),
            "logprobs": [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)],
        }
        for answer in answers
    ]
    Path(job["output"]).write_text(json.dumps(results))
    del llm
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(run)
