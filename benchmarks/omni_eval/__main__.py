"""python -m benchmarks.omni_eval BENCHMARK DIR --base-url URL --output OUT: ask a server a benchmark's questions."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

import openai
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import one_line_errors
from benchmarks.omni_eval import air_bench, mmmu, scienceqa, video_mme
from benchmarks.omni_eval.answers import Answers
from benchmarks.omni_eval.ask import ask_all
from benchmarks.omni_eval.items import Item, Media
from benchmarks.omni_eval.summary import summarise, table
from morphoquant_vllm.errors import MorphoQuantError

BENCHMARKS: dict[str, ModuleType] = {
    "scienceqa": scienceqa,
    "mmmu": mmmu,
    "video-mme": video_mme,
    "air-bench": air_bench,
}
SUMMARY_FILE = "summary.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.omni_eval", description=__doc__)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("directory", type=Path, help="local copy, in the layout in which it is published")
    parser.add_argument("--base-url", required=True, help="of the server's OpenAI API, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument("--output", type=Path, required=True, help="folder of this run's answers and summary")
    parser.add_argument("--model", help="name on the server (default: the first it lists)")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--split", help="default: the one that is usually reported")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (32)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a request counts as unanswered (600)")
    parser.add_argument("--retries", type=int, default=2, help="of a request that fails on the server's side (2)")
    return parser.parse_args(arguments)


def fingerprint(items: Sequence[Item]) -> str:
    """Of what is asked and what is right; media in files by name alone."""
    digest = hashlib.sha256()
    for item in items:
        parts = [part.source if isinstance(part, Media) else part for part in item.parts]
        named = [part.name if isinstance(part, Path) else part for part in parts]
        digest.update(repr((item.id, named, dict(item.choices), item.answers)).encode())
    return digest.hexdigest()[:16]


async def run(options: argparse.Namespace, console: Console) -> None:
    """One run, from the data set to its summary."""
    benchmark = BENCHMARKS[options.benchmark]
    items = list(islice(benchmark.load(options.directory, options.split or benchmark.SPLIT), options.limit))
    if not items:
        raise MorphoQuantError(f"{options.directory}: holds no question of {benchmark.NAME}")
    if len({item.id for item in items}) != len(items):
        raise MorphoQuantError(f"{options.directory}: two questions have the same id; download {benchmark.NAME} again")
    async with openai.AsyncOpenAI(
        base_url=options.base_url, api_key=options.api_key, timeout=options.timeout, max_retries=options.retries
    ) as client:
        try:
            model = options.model or (await client.models.list()).data[0].id
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())
            raise MorphoQuantError(f"{options.base_url}: no OpenAI server answers ({reason}); start one") from error
        asked = {"benchmark": benchmark.NAME, "model": model, "max_tokens": options.max_tokens}
        answers = Answers(options.output, {**asked, "questions": fingerprint(items)})
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(benchmark.NAME, total=len(items), completed=len(answers.responses))
            await ask_all(
                client,
                model,
                items,
                answers,
                concurrency=options.concurrency,
                max_tokens=options.max_tokens,
                on_answer=lambda: progress.advance(task),
            )
    summary = {**asked, **summarise(items, answers.responses)}
    (options.output / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console().print(table(benchmark.NAME, summary))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        asyncio.run(run(parse(arguments), Console(stderr=True)))


if __name__ == "__main__":
    main()
