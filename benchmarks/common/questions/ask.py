"""Asks a server all questions that have no answer yet, several at a time."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Any

import openai

from benchmarks.common.questions.answers import Answers
from benchmarks.common.questions.items import Item, Media
from morphoquant_vllm.errors import MorphoQuantError

# Gone, too slow, broken, or nobody there to ask. Any other status is about one request, and that request's own trouble.
STOPPED = (
    openai.APIConnectionError,
    openai.InternalServerError,
    openai.RateLimitError,
    openai.AuthenticationError,
    openai.PermissionDeniedError,
    openai.NotFoundError,
)


def content(item: Item) -> list[dict[str, Any]]:
    """The parts of the user's turn in OpenAI's form; video_url is vLLM's and other engines' extension of it."""
    return [{"type": "text", "text": part} if isinstance(part, str) else _medium(part) for part in item.parts]


def _medium(media: Media) -> dict[str, Any]:
    data = base64.b64encode(media.read()).decode()
    if media.kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": media.format}}
    kind = f"{media.kind}_url"
    return {"type": kind, kind: {"url": f"data:{media.kind}/{media.format};base64,{data}"}}


async def ask_all(
    client: openai.AsyncOpenAI,
    model: str,
    items: Sequence[Item],
    answers: Answers,
    *,
    concurrency: int,
    max_tokens: int,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Fill `answers`, greedily decoded. A request that the server refuses is noted as such.

    Raises MorphoQuantError if the server stops answering; every answer until then is kept.
    """
    waiting = [item for item in items if item.id not in answers.responses]
    queue = iter(waiting)

    async def worker() -> None:
        for item in queue:
            try:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": content(item)}],  # type: ignore[list-item]
                    max_tokens=max_tokens,
                    temperature=0,
                )
            except STOPPED:
                raise
            except openai.APIStatusError as error:
                answers.add(item.id, None, " ".join(str(error).split())[:300])
            else:
                answers.add(item.id, completion.choices[0].message.content or "")
            on_answer()

    reason: str | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(waiting))):
                group.create_task(worker())
    except* STOPPED as stopped:
        reason = " ".join(str(stopped.exceptions[0]).split())
    # Outside the block above: Python 3.11.2 wraps exceptions raised there in an exception group.
    if reason is not None:
        done = sum(item.id in answers.responses for item in items)
        raise MorphoQuantError(
            f"{client.base_url}: the server stopped answering ({reason}); {done} of {len(items)} questions are "
            "answered and kept: run the same command again to go on"
        )
