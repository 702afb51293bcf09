"""One row of the table: a server, and its answers to every benchmark."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.files import write_atomically
from benchmarks.common.questions.answers import read_answers
from benchmarks.common.questions.run import Endpoint, answered, checked
from benchmarks.common.questions.summary import summarise
from benchmarks.common.server import ServerError, serve
from benchmarks.paper import prompts
from benchmarks.paper.questions import BENCHMARKS, asked
from morphoquant_vllm.errors import MorphoQuantError

SUMMARY_FILE, LOG_FILE = "summary.json", "serve.log"
# Frames of a video, evenly spaced, as in the paper's code. By itself vLLM would take two a second of this model's
# videos, up to 768 (multimodal/video.py, Qwen2VLVideoBackend): a long one would exceed the context.
FRAMES = 32
SERVE_ARGUMENTS = (
    # MMMU shows up to seven images. Images of one question may be large; nothing is profiled beyond them.
    '--limit-mm-per-prompt={"image":7,"audio":1,"video":1}',
    f'--media-io-kwargs={{"video":{{"video_backend":"opencv","num_frames":{FRAMES}}}}}',
)
# vLLM refuses sounds of more than 25 MB or 10 minutes; some of AIR-Bench's music may be longer.
SERVE_ENVIRONMENT = {"VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "512", "VLLM_MAX_AUDIO_DECODE_DURATION_S": "3600"}


@dataclass(frozen=True)
class Row:
    """A model that is served here, or a server's URL."""

    name: str
    # Folder of its answers.
    folder: Path
    model: Path | None = None
    url: str = ""


def ask(row: Row, options: Any, held_out: Mapping[str, Sequence[str]], console: Console) -> dict[str, dict[str, Any]]:
    """Summaries by benchmark. Answered questions are not asked again, and no server is started for them.

    Raises MorphoQuantError if the server does not start, or stops answering; every answer until then is kept.
    """
    done = {name: found for name in options.benchmarks if (found := _summary(row.folder / name)) is not None}
    waiting = [name for name in options.benchmarks if name not in done]
    if waiting:
        with endpoint(row, options) as server:
            for name in waiting:
                done[name] = ask_one(row, name, server, options, held_out.get(name, ()), console)
    return {name: done[name] for name in options.benchmarks}


def _summary(folder: Path) -> dict[str, Any] | None:
    place = folder / SUMMARY_FILE
    if not place.is_file():
        return None
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


@contextmanager
def endpoint(row: Row, options: Any) -> Iterator[Endpoint]:
    """The row's server, started here unless it has a URL, and stopped at the end of the block."""
    settings = {"timeout": options.timeout, "concurrency": options.concurrency}
    if row.model is None:
        yield Endpoint(row.url, options.api_key, **settings)
        return
    row.folder.mkdir(parents=True, exist_ok=True)
    log = row.folder / LOG_FILE
    arguments = (*SERVE_ARGUMENTS, *options.serve_arguments)
    try:
        with serve(row.model, log, arguments, timeout=options.start_timeout, environment=SERVE_ENVIRONMENT) as server:
            yield Endpoint(server.openai_url, **settings)
    except ServerError as error:
        reason = str(error).splitlines()[0].split(";")[0]
        raise MorphoQuantError(f"{row.name}: {reason}; its log {log} says why") from error


def ask_one(
    row: Row, name: str, server: Endpoint, options: Any, held_out: Sequence[str], console: Console
) -> dict[str, Any]:
    """Ask one benchmark's questions that have no answer yet; its summary, which is also written."""
    benchmark = BENCHMARKS[name]
    reader, folder = benchmark.reader, row.folder / name
    found = asked(benchmark, options.data, options, held_out)
    items, missing = checked(
        found,
        reader.NAME,
        benchmark.directory(options.data),
        limit=options.limit,
        skip_missing=options.skip_missing,
    )
    if benchmark.concurrency is not None:
        at_once = min(server.concurrency, benchmark.concurrency)
        server = Endpoint(server.url, server.key, server.model, server.timeout, server.retries, at_once)
    by_paper = prompts.score(name)
    most, rule = (
        (prompts.ASKED[name].max_tokens, by_paper)
        if options.prompts == prompts.PAPER
        else (reader.MAX_TOKENS, reader.score)
    )
    run = {"benchmark": reader.NAME, "max_tokens": options.max_tokens or most}
    if options.system:
        run["system"] = options.system
    console.print(f"{row.name}: {reader.NAME}, {len(items)} questions", highlight=False)
    said, answers = asyncio.run(answered(items, folder, run, server, console))
    summary = {
        **said,
        "seconds": answers.seconds,
        "without_media": missing,
        "held_out_media": len(held_out),
        **summarise(items, answers.responses, rule),
        "paper_rule": summarise(items, answers.responses, by_paper)["all"],
    }
    # Last: its presence says that every question is answered.
    write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def measured_rates(folders: Sequence[Path], names: Sequence[str]) -> dict[str, float]:
    """Seconds of an answer by benchmark, of earlier answers in any row."""
    rates: dict[str, float] = {}
    for name in names:
        counts = [read_answers(folder / name) for folder in folders]
        total = sum(len(responses) for responses, _, _ in counts)
        if total:
            rates[name] = sum(seconds for _, seconds, _ in counts) / total
    return rates
