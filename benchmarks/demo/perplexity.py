"""Perplexity of a served model, through vLLM's prompt_logprobs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI


def windows(model: Path, text: str, *, tokens: int, count: int) -> list[list[int]]:
    """`count` windows of `tokens` token ids each, spread evenly over the text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    if len(ids) < count * tokens:
        raise ValueError(f"the text has {len(ids)} tokens, {count} windows of {tokens} need {count * tokens}")
    stride = (len(ids) - tokens) // max(count - 1, 1)
    return [ids[index * stride : index * stride + tokens] for index in range(count)]


def perplexity(client: OpenAI, model: str, prompts: list[list[int]]) -> float:
    """exp of the mean negative log probability of every token but each window's first."""
    total, count = 0.0, 0
    for prompt in prompts:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        entries = answer.choices[0].model_extra["prompt_logprobs"]
        for token, entry in zip(prompt[1:], entries[1:], strict=True):
            total -= entry[str(token)]["logprob"]
            count += 1
    return math.exp(total / count)
