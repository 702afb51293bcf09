"""The questions of a local copy, and one server's responses to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.questions.answers import Answers
from benchmarks.common.questions.ask import Asking, ask_all
from benchmarks.common.questions.items import Item, Media, present
from morphoquant_vllm.errors import MorphoQuantError


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI server and how it is asked; `timeout` in seconds, `model` None for the first that it lists."""

    url: str
    key: str = "none"
    model: str | None = None
    timeout: float = 600
    retries: int = 2
    concurrency: int = 8


def fingerprint(items: Sequence[Item]) -> str:
    """Hash of the questions and their answers; media in files count by name only."""
    digest = hashlib.sha256()
    for item in items:
        parts = [part.source if isinstance(part, Media) else part for part in item.parts]
        named = [part if isinstance(part, str | bytes) else part.name for part in parts]
        digest.update(repr((item.id, named, dict(item.choices), item.answers)).encode())
    return digest.hexdigest()[:16]


def checked(
    found: Iterable[Item], benchmark: str, directory: Path, *, limit: int | None = None, skip_missing: bool = False
) -> tuple[list[Item], int]:
    """The first `limit` questions, and how many of them were left out because their media are missing.

    Raises MorphoQuantError if there are none, if two have one id, or if media are missing and not to be skipped.
    """
    items = list(islice(found, limit))
    kept = present(items, benchmark, skip=skip_missing)
    if not kept:
        raise MorphoQuantError(f"{directory}: holds no question of {benchmark}")
    if len({item.id for item in kept}) != len(kept):
        raise MorphoQuantError(f"{directory}: two questions have the same id; download {benchmark} again")
    return kept, len(items) - len(kept)


async def answered(
    items: Sequence[Item], output: Path, run: Mapping[str, Any], server: Endpoint, console: Console
) -> tuple[dict[str, Any], Answers]:
    """Responses of a server to all questions, kept in `output`, and the identity of this run.

    `run` has the benchmark's name, "max_tokens" of an answer, and perhaps a "system" prompt. Raises MorphoQuantError if
    nobody answers at the server's URL, or if it stops answering.
    """
    async with openai.AsyncOpenAI(
        base_url=server.url, api_key=server.key, timeout=server.timeout, max_retries=server.retries
    ) as client:
        try:
            model = server.model or (await client.models.list()).data[0].id
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())
            raise MorphoQuantError(f"{server.url}: no OpenAI server answers ({reason}); start one") from error
        asked = {**run, "model": model}
        answers = Answers(output, {**asked, "questions": fingerprint(items)})
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(run["benchmark"], total=len(items), completed=len(answers.responses))
            asking = Asking(
                client,
                model,
                answers,
                max_tokens=run["max_tokens"],
                system=run.get("system", ""),
                on_answer=lambda: progress.advance(task),
            )
            await ask_all(asking, items, server.concurrency)
    return asked, answers
