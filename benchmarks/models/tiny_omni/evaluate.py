"""Greedy answers to questions, by transformers and by vLLM, and how many are right."""

from __future__ import annotations

import base64
import json
import math
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.tiny_omni.data.encoding import Encoder
from benchmarks.models.tiny_omni.data.questions import Question

# The longest answers have two digits, each a token; then the turn ends.
ANSWER_TOKENS = 4
# vLLM holds the processed media of all that it is asked at once: of 2,100 questions they take 7 GB.
ASKED_AT_ONCE = 100


@torch.no_grad()
def answers_transformers(
    thinker: Any, processor: Any, questions: Sequence[Question], batch_size: int = 64
) -> list[str]:
    """The answers of a Qwen2_5OmniThinkerForConditionalGeneration, in the order of the questions."""
    encoder = Encoder(processor)
    answers = [""] * len(questions)
    # Questions of a kind are about equally long, which saves padding.
    order = sorted(range(len(questions)), key=lambda index: questions[index].kind)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encoder.batch([questions[index] for index in chosen])
        tokens = thinker.generate(
            **batch,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        texts = processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


@torch.no_grad()
def answer_log_probs(
    thinker: Any, processor: Any, questions: Sequence[Question], batch_size: int = 64
) -> list[torch.Tensor]:
    """Log probabilities of the whole vocabulary at each token of the right answer, given those before it.

    float32 [answer's tokens, vocabulary] for each question; the last token is the end of the turn.
    """
    encoder = Encoder(processor)
    found: list[torch.Tensor] = [torch.empty(0)] * len(questions)
    order = sorted(range(len(questions)), key=lambda index: questions[index].kind)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encoder.batch([questions[index] for index in chosen], with_answers=True)
        labels = batch.pop("labels")[:, 1:]
        logits = thinker(**batch, use_cache=False).logits[:, :-1]
        for index, own, wanted in zip(chosen, logits, labels, strict=True):
            found[index] = own[wanted >= 0].float().log_softmax(-1)
    return found


def answers_vllm(llm: Any, questions: Sequence[Question]) -> list[str]:
    """The answers of an in-process vllm.LLM through its chat API, in the order of the questions.

    The engine must allow one image, one audio and one video a prompt; media are handed over as data: URLs.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    answers = []
    for start in range(0, len(questions), ASKED_AT_ONCE):
        asked = [with_data_urls(question.messages) for question in questions[start : start + ASKED_AT_ONCE]]
        answers += [output.outputs[0].text for output in llm.chat(asked, sampling, use_tqdm=False)]
    return answers


def with_data_urls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the messages in which local media files are data: URLs, as servers take them."""
    copied: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in copied:
        for part in message["content"] if isinstance(message["content"], list) else []:
            body = part.get(part["type"])
            if part["type"] != "text" and not body["url"].startswith("data:"):
                path = Path(body["url"])
                media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
                body["url"] = f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return copied


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each kind and, last, of "all". An answer counts when it matches exactly."""
    counts: dict[str, tuple[int, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        for kind in (question.kind, "all"):
            right, total = counts.pop(kind, (0, 0)) if kind == "all" else counts.get(kind, (0, 0))
            counts[kind] = (right + (answer.strip() == question.answer), total + 1)
    return counts


def standard_error(right: int, total: int) -> float:
    """Standard error of the share right / total, if questions are drawn independently."""
    share = right / total
    return math.sqrt(share * (1 - share) / total)
