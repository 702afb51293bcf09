"""Asks a server all questions that have no answer yet, several at a time."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import openai

from benchmarks.common.questions.answers import Answers
from benchmarks.common.questions.items import Item, Media
from morphoquant_vllm.errors import MorphoQuantError

# Gone, too slow, broken, or nobody there to ask. Any other status is about one request, and that request's own trouble.
# A server that is broken may be so for one request alone, such as one with a sound that it cannot decode.
STOPPED = (
    openai.APIConnectionError,
    openai.InternalServerError,
    openai.RateLimitError,
    openai.AuthenticationError,
    openai.PermissionDeniedError,
    openai.NotFoundError,
)
# So many requests in a row that break a server in good health are no longer the requests' trouble.
MOST_BROKEN = 16
HEALTH_SECONDS = 30


def content(item: Item) -> list[dict[str, Any]]:
    """The parts of the user's turn in OpenAI's form; video_url is vLLM's and other engines' extension of it."""
    return [{"type": "text", "text": part} if isinstance(part, str) else _medium(part) for part in item.parts]


def _medium(media: Media) -> dict[str, Any]:
    data = base64.b64encode(media.read()).decode()
    if media.kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": media.format}}
    kind = f"{media.kind}_url"
    return {"type": kind, kind: {"url": f"data:{media.kind}/{media.format};base64,{data}"}}


class Asking:
    """One server that is asked, and the answers that it gives."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        answers: Answers,
        *,
        max_tokens: int,
        system: str = "",
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """`system` is the system prompt; without one the model's chat template decides."""
        self.client, self.model, self.answers = client, model, answers
        self.max_tokens, self.on_answer = max_tokens, on_answer
        self.first: list[Any] = [{"role": "system", "content": system}] if system else []
        # Why the server broke on a question, by the question's id. It is noted once the server answers another one.
        self.broken: dict[str, openai.InternalServerError] = {}

    async def work(self, queue: Iterator[Item]) -> None:
        """Ask one question after the other; raises one of STOPPED if the server has stopped."""
        for item in queue:
            messages = [*self.first, {"role": "user", "content": content(item)}]
            try:
                completion = await self.client.chat.completions.create(
                    model=self.model,
                    messages=messages,
                    max_tokens=self.max_tokens,
                    temperature=0,
                )
            except openai.InternalServerError as error:
                # First: meanwhile another worker may get an answer that a dying server gave before.
                if not await self.is_healthy():
                    raise
                self.broken[item.id] = error
                if len(self.broken) > MOST_BROKEN:
                    raise
            except STOPPED:
                raise
            except openai.APIStatusError as error:
                self._note(item.id, None, error)
            else:
                self._note(item.id, completion.choices[0].message.content or "")
                self.note_broken()

    def note_broken(self) -> None:
        """Note the questions on which the server broke as refused."""
        for name, error in self.broken.items():
            self._note(name, None, error)
        self.broken.clear()

    async def is_healthy(self) -> bool:
        """Whether the server says so at /health, beside its API."""
        url = f"{str(self.client.base_url).rstrip('/').removesuffix('/v1')}/health"
        try:
            async with httpx.AsyncClient(timeout=HEALTH_SECONDS) as client:
                return (await client.get(url)).is_success
        except httpx.HTTPError:
            return False

    def _note(self, name: str, response: str | None, error: openai.APIStatusError | None = None) -> None:
        self.answers.add(name, response, _line(error)[:300] if error else "")
        self.on_answer()


async def ask_all(asking: Asking, items: Sequence[Item], concurrency: int) -> None:
    """Fill the answers, greedily decoded. A request that the server refuses, or breaks on, is noted as such.

    Raises MorphoQuantError if the server stops answering; every answer until then is kept.
    """
    answers, client = asking.answers, asking.client
    waiting = [item for item in items if item.id not in answers.responses]
    queue = iter(waiting)
    reason: str | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(waiting))):
                group.create_task(asking.work(queue))
    except* STOPPED as stopped:
        reason = _line(stopped.exceptions[0])
    if reason is None and asking.broken:
        # The last questions: no answer came after them.
        if any(response is not None for response in answers.responses.values()):
            asking.note_broken()
        else:
            reason = _line(next(iter(asking.broken.values())))
    # Outside the block above: Python 3.11.2 wraps exceptions raised there in an exception group.
    if reason is not None:
        done = sum(item.id in answers.responses for item in items)
        raise MorphoQuantError(
            f"{client.base_url}: the server stopped answering ({reason}); {done} of {len(items)} questions are "
            "answered and kept: run the same command again to go on"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
