"""Score a checkpoint on tasks of lm-eval: through a server, or in this process with transformers.

vllm serve OUT &
python examples/lm_eval_checkpoint.py OUT --tasks arc_easy --limit 100 --base-url http://127.0.0.1:8000/v1
python examples/lm_eval_checkpoint.py OUT --tasks arc_easy --limit 100

A server works on many requests at a time, so it is faster.
"""

import argparse
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import morphoquant_vllm.hf  # noqa: F401 (registers the checkpoints' quantizer with transformers)


def served(checkpoint: str, base_url: str) -> dict[str, Any]:
    """Arguments of `simple_evaluate` for a server; the tokenizer counts the tokens of a context."""
    settings = {
        "model": checkpoint,
        "base_url": f"{base_url.rstrip('/')}/completions",
        "tokenizer": checkpoint,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 8,
    }
    return {"model": "local-completions", "model_args": settings}


def loaded(checkpoint: str) -> dict[str, Any]:
    """Arguments of `simple_evaluate` for transformers. Of an omni model, the thinker answers."""
    omni = transformers.AutoConfig.from_pretrained(checkpoint).model_type == "qwen2_5_omni"
    model_class: Any = (
        transformers.Qwen2_5OmniThinkerForConditionalGeneration if omni else transformers.AutoModelForCausalLM
    )
    model = model_class.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return {"model": HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a checkpoint on tasks of lm-eval.")
    parser.add_argument("checkpoint", help="as `vllm serve` got it")
    parser.add_argument("--tasks", required=True, help="names of tasks, separated by commas")
    parser.add_argument("--include-path", type=Path, help="folder of tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of a task (default: all)")
    parser.add_argument("--base-url", help="a server's OpenAI address; without it transformers loads the checkpoint")
    arguments = parser.parse_args()

    checkpoint = arguments.checkpoint
    results = lm_eval.simple_evaluate(
        **(served(checkpoint, arguments.base_url) if arguments.base_url else loaded(checkpoint)),
        tasks=arguments.tasks.split(","),
        task_manager=TaskManager(include_path=arguments.include_path),
        limit=arguments.limit,
    )
    print(make_table(results))


if __name__ == "__main__":
    main()
