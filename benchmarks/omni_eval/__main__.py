"""python -m benchmarks.omni_eval BENCHMARK DIR --base-url URL --output OUT: ask a server a benchmark's questions."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from types import ModuleType

from rich.console import Console

from benchmarks.common.command import one_line_errors
from benchmarks.common.questions.datasets import air_bench, air_bench_chat, mmmu, scienceqa, video_mme
from benchmarks.common.questions.items import Item
from benchmarks.common.questions.run import Endpoint, answered, checked
from benchmarks.common.questions.summary import summarise, table
from benchmarks.omni_eval.options import JUDGED, WITH_SUBTITLES, parse

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


def questions(options: argparse.Namespace) -> tuple[list[Item], int]:
    """The questions, and the number of questions left out because their media are missing."""
    benchmark = BENCHMARKS[options.benchmark]
    settings = {"subtitles": options.subtitles} if options.benchmark == WITH_SUBTITLES else {}
    found = benchmark.load(options.directory, options.split or benchmark.SPLIT, **settings)
    return checked(found, benchmark.NAME, options.directory, limit=options.limit, skip_missing=options.skip_missing)


def endpoint(options: argparse.Namespace, url: str, key: str, model: str | None) -> Endpoint:
    """A server, asked as the options say."""
    return Endpoint(url, key, model, options.timeout, options.retries, options.concurrency)


async def run(options: argparse.Namespace, console: Console) -> None:
    """One run, from the data set to its summary."""
    benchmark = BENCHMARKS[options.benchmark]
    items, missing = questions(options)
    settings = {"benchmark": benchmark.NAME, "max_tokens": options.max_tokens or benchmark.MAX_TOKENS}
    server = endpoint(options, options.base_url, options.api_key, options.model)
    asked, answers = await answered(items, options.output, settings, server, console)
    responses = answers.responses
    if options.benchmark == JUDGED:
        judge, judged = await answered(
            air_bench_chat.judgements(items, responses),
            options.output / JUDGE_FOLDER,
            {"benchmark": f"{benchmark.NAME}, judgements", "max_tokens": air_bench_chat.JUDGE_TOKENS},
            endpoint(options, options.judge_url, options.judge_api_key, options.judge_model),
            console,
        )
        asked["judge"] = judge["model"]
        figures = air_bench_chat.summarise(items, responses, judged.responses)
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
