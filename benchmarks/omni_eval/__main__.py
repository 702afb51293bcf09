"""python -m benchmarks.omni_eval BENCHMARK DIR --base-url URL --output OUT: ask a server a benchmark's questions."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.command import one_line_errors
from benchmarks.omni_eval.answers import Answers
from benchmarks.omni_eval.ask import ask_all
from benchmarks.omni_eval.datasets import air_bench, air_bench_chat, mmmu, scienceqa, video_mme
from benchmarks.omni_eval.items import Item, Media, present
from benchmarks.omni_eval.options import JUDGED, WITH_SUBTITLES, parse
from benchmarks.omni_eval.summary import summarise, table
from morphoquant_vllm.errors import MorphoQuantError

BENCHMARKS: dict[str, ModuleType] = {
    "scienceqa": scienceqa,
    "mmmu": mmmu,
    WITH_SUBTITLES: video_mme,
    "air-bench": air_bench,
    JUDGED: air_bench_chat,
}
SUMMARY_FILE = "summary.json"
# Folder of a run that holds the judge's answers.
JUDGE_FOLDER = "judge"


def fingerprint(items: Sequence[Item]) -> str:
    """Hash of the questions and the right answers; media in files count by name alone."""
    digest = hashlib.sha256()
    for item in items:
        parts = [part.source if isinstance(part, Media) else part for part in item.parts]
        named = [part.name if isinstance(part, Path) else part for part in parts]
        digest.update(repr((item.id, named, dict(item.choices), item.answers)).encode())
    return digest.hexdigest()[:16]


def questions(options: argparse.Namespace) -> tuple[list[Item], int]:
    """The questions, and the number of questions left out because their media are missing."""
    benchmark = BENCHMARKS[options.benchmark]
    settings = {"subtitles": options.subtitles} if options.benchmark == WITH_SUBTITLES else {}
    found = benchmark.load(options.directory, options.split or benchmark.SPLIT, **settings)
    items = list(islice(found, options.limit))
    kept = present(items, benchmark.NAME, skip=options.skip_missing)
    if not kept:
        raise MorphoQuantError(f"{options.directory}: holds no question of {benchmark.NAME}")
    if len({item.id for item in kept}) != len(kept):
        raise MorphoQuantError(f"{options.directory}: two questions have the same id; download {benchmark.NAME} again")
    return kept, len(items) - len(kept)


async def answered(
    items: Sequence[Item],
    output: Path,
    run: Mapping[str, Any],
    options: argparse.Namespace,
    console: Console,
    *,
    url: str,
    key: str,
    model: str | None,
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Responses of the server at `url` to all questions, kept in `output`, and the identity of this run."""
    async with openai.AsyncOpenAI(
        base_url=url, api_key=key, timeout=options.timeout, max_retries=options.retries
    ) as client:
        try:
            model = model or (await client.models.list()).data[0].id
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())
            raise MorphoQuantError(f"{url}: no OpenAI server answers ({reason}); start one") from error
        asked = {**run, "model": model}
        answers = Answers(output, {**asked, "questions": fingerprint(items)})
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(run["benchmark"], total=len(items), completed=len(answers.responses))
            await ask_all(
                client,
                model,
                items,
                answers,
                concurrency=options.concurrency,
                max_tokens=run["max_tokens"],
                on_answer=lambda: progress.advance(task),
            )
    return asked, answers.responses


async def run(options: argparse.Namespace, console: Console) -> None:
    """One run, from the data set to its summary."""
    benchmark = BENCHMARKS[options.benchmark]
    items, missing = questions(options)
    settings = {"benchmark": benchmark.NAME, "max_tokens": options.max_tokens or benchmark.MAX_TOKENS}
    asked, responses = await answered(
        items,
        options.output,
        settings,
        options,
        console,
        url=options.base_url,
        key=options.api_key,
        model=options.model,
    )
    if options.benchmark == JUDGED:
        judge, judged = await answered(
            air_bench_chat.judgements(items, responses),
            options.output / JUDGE_FOLDER,
            {"benchmark": f"{benchmark.NAME}, judgements", "max_tokens": air_bench_chat.JUDGE_TOKENS},
            options,
            console,
            url=options.judge_url,
            key=options.judge_api_key,
            model=options.judge_model,
        )
        asked["judge"] = judge["model"]
        figures = air_bench_chat.summarise(items, responses, judged)
        shown = air_bench_chat.table(figures)
    else:
        figures = summarise(items, responses, benchmark.score)
        shown = table(benchmark.NAME, figures)
    summary = {**asked, "without_media": missing, **figures}
    (options.output / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console().print(shown)
    if missing:
        Console().print(f"left out, since their media are missing: {missing} questions")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        asyncio.run(run(parse(arguments, BENCHMARKS, __doc__), Console(stderr=True)))


if __name__ == "__main__":
    main()
