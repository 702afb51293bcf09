"""The command line of benchmarks.omni_eval."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common.command import at_least_one
from morphoquant_vllm.errors import MorphoQuantError

WITH_SUBTITLES, JUDGED = "video-mme", "air-bench-chat"


def frames(text: str) -> int:
    """Frames at whose times subtitles are told; 0 for "all"."""
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of frames; give one above 0, or all")
    return int(text)


def parse(arguments: Sequence[str] | None, names: Iterable[str], description: str | None) -> argparse.Namespace:
    """Options of a run; MorphoQuantError if the benchmark needs a missing one, or cannot use a given one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.omni_eval", description=description)
    parser.add_argument("benchmark", choices=sorted(names))
    parser.add_argument("directory", type=Path, help="local copy, in the layout in which it is published")
    parser.add_argument("--base-url", required=True, help="of the server's OpenAI API, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument("--output", type=Path, required=True, help="folder of this run's answers and summary")
    parser.add_argument("--model", help="name on the server (default: the first it lists)")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--split", help="default: the one that is usually reported")
    parser.add_argument("--limit", type=at_least_one, help="only the first N questions")
    parser.add_argument("--skip-missing", action="store_true", help="leave out questions whose media files are missing")
    parser.add_argument("--concurrency", type=at_least_one, default=8, help="requests at a time (8)")
    parser.add_argument("--max-tokens", type=at_least_one, help="of an answer (default: lmms-eval's for the benchmark)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a request counts as unanswered (600)")
    parser.add_argument("--retries", type=int, default=2, help="of a request that fails on the server's side (2)")
    parser.add_argument(
        "--subtitles",
        type=frames,
        metavar="FRAMES",
        help=f"{WITH_SUBTITLES}: tell the subtitles at FRAMES frames, as many as the server samples, or all of them",
    )
    parser.add_argument("--judge-url", help=f"{JUDGED}: the judge's OpenAI API")
    parser.add_argument("--judge-model", help="the judge's name there (default: the first it lists)")
    parser.add_argument(
        "--judge-api-key",
        default=os.environ.get("OPENAI_API_KEY", "none"),
        help=f"{JUDGED}: default: the environment variable OPENAI_API_KEY",
    )
    options = parser.parse_args(arguments)
    if options.subtitles is not None and options.benchmark != WITH_SUBTITLES:
        raise MorphoQuantError(f"--subtitles: {options.benchmark} has none; leave it out")
    if options.judge_url is None and options.benchmark == JUDGED:
        raise MorphoQuantError(f"{JUDGED}: another model scores the answers; name its server with --judge-url")
    if options.judge_url is not None and options.benchmark != JUDGED:
        raise MorphoQuantError(f"--judge-url: no judge scores {options.benchmark}; leave it out")
    return options
