"""python -m benchmarks.accuracy.serving.worker JOB.json: run one vLLM engine, and put its results into the cache.

prompt_logprobs through LLM.generate cost the forward pass plus the lm_head on every token. Two other things made such
requests slow on CPUs: bfloat16 on a processor without instructions for it, and torch.compile of the kernel that ranks
tokens, once in each process. Hence float32, and TORCH_COMPILE_DISABLE in `served.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy import language, omni
from benchmarks.accuracy.kept.cache import Cache
from benchmarks.accuracy.methods import ASKING
from benchmarks.accuracy.serving.escapes import EscapeCounter
from benchmarks.models.tiny_omni.data.digits import FRAMES_PER_SECOND

# No question of the omni benchmark is longer.
MAX_MODEL_LEN = 2048
MAX_SEQUENCES, OMNI_MAX_SEQUENCES = 4, 16


def make_engine(job: dict[str, Any]) -> Any:
    """An eager engine that computes every token of every prompt; prefixes are not reused."""
    from vllm import LLM

    if job["benchmark"] in ASKING:
        length, sequences = MAX_MODEL_LEN, OMNI_MAX_SEQUENCES
        media: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1, "video": 1, "audio": 1}}
        # The models were trained at this rate. vLLM does not read it from a model's files, and Qwen3-Omni's processor
        # takes 1 without it: clips would lie twice as far apart in time.
        media["mm_processor_kwargs"] = {"fps": FRAMES_PER_SECOND}
    else:
        # A prompt and the one token that vLLM insists on generating.
        length = 1 + max(len(ids) for task in job["tasks"] for ids in task["windows"])
        sequences, media = MAX_SEQUENCES, {}
    return LLM(
        job["model"],
        dtype=job["dtype"],
        seed=job["seed"],
        max_model_len=length,
        max_num_seqs=sequences,
        enforce_eager=True,
        enable_prefix_caching=False,
        **media,
    )


def window_losses(llm: Any, windows: list[list[int]]) -> list[float]:
    """Summed negative log probability of every token but the first, per window."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in windows], sampling, use_tqdm=False)
    return [
        -sum(entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True))
        for ids, output in zip(windows, outputs, strict=True)
    ]


def run_task(benchmark: str, task: dict[str, Any], llm: Any) -> dict[str, Any]:
    """The result of one evaluation set."""
    if benchmark not in ASKING:
        return language.outcome(window_losses(llm, task["windows"]), task["windows"])
    from benchmarks.models.tiny_omni.data.questions import test_questions
    from benchmarks.models.tiny_omni.evaluate import answers_vllm

    questions = test_questions(Path(task["work"]), task["questions"], task["seed"])
    return omni.outcome(questions, answers_vllm(llm, questions))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cache = Cache(Path(job["cache"]))
    llm = make_engine(job)
    counter = EscapeCounter(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model)
    for task in job["tasks"]:
        counter.take()
        result = run_task(job["benchmark"], task, llm)
        # Stored at once, so an interrupted run keeps it.
        cache.store(task["key"], {**result, "beyond": counter.take()})


if __name__ == "__main__":
    main()
