"""The command line of benchmarks.paper."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command import at_least_one
from benchmarks.paper.prompts import OWN, PAPER, SYSTEM
from benchmarks.paper.questions import ALL, BENCHMARKS, IMAGE


def server(text: str) -> tuple[str, str]:
    """NAME=URL of a server that is asked, too."""
    name, _, url = text.partition("=")
    if not re.fullmatch(r"[\w .+-]+", name) or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL; write e.g. awq=http://127.0.0.1:8001/v1")
    return name, url


def words(text: str) -> list[str]:
    """Arguments for another command, as a shell splits them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be split ({error}); close its quotes") from error


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Options of a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=description)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of Qwen2.5-Omni-3B or -7B")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with the data sets: " + ", ".join(benchmark.folder for benchmark in BENCHMARKS.values()),
    )
    parser.add_argument("--output", type=Path, help="checkpoint, answers, table (default: paper-MODEL, here)")
    parser.add_argument("--dry-run", action="store_true", help="only check the files, and estimate; weights may lack")
    parser.add_argument("--benchmarks", nargs="+", choices=tuple(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument(
        "--scienceqa", choices=(ALL, IMAGE), default=ALL, help=f"all questions of test, or those with an image ({ALL})"
    )
    parser.add_argument(
        "--prompts",
        choices=(OWN, PAPER),
        default=OWN,
        help=f"prompts, numbers of tokens and rules: each benchmark's own, or those of the paper's code ({OWN})",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help=f"system prompt (default: Qwen's with --prompts {PAPER}, else the template's)"
    )
    parser.add_argument("--calibration-data", type=Path, nargs="+", help="conversations (.jsonl) or texts of your own")
    parser.add_argument(
        "--no-hold-out",
        dest="hold_out",
        action="store_false",
        help="calibrate on no video and no sound of Video-MME and AIR-Bench, and ask all of their questions",
    )
    parser.add_argument("--calibrate-arguments", type=words, default=[], metavar="WORDS", help="for calibration")
    parser.add_argument("--serve-arguments", type=words, default=[], metavar="WORDS", help="for vllm serve")
    parser.add_argument("--without-16-bit", action="store_true", help="leave out the row of the 16-bit model")
    parser.add_argument(
        "--server", type=server, action="append", default=[], metavar="NAME=URL", help="one more row; repeatable"
    )
    parser.add_argument("--api-key", default="none", help="of those servers")
    parser.add_argument("--limit", type=at_least_one, help="only the first N questions of each benchmark, for a trial")
    parser.add_argument("--skip-missing", action="store_true", help="leave out questions whose media files are missing")
    parser.add_argument(
        "--concurrency", type=at_least_one, default=8, help="requests at a time (8; of Video-MME at most 2)"
    )
    parser.add_argument("--max-tokens", type=at_least_one, help="of an answer (default: that of the prompts)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a request counts as unanswered (600)")
    parser.add_argument("--start-timeout", type=float, default=1800, help="seconds for vllm serve to start (1800)")
    options = parser.parse_args(arguments)
    if options.system is None:
        options.system = SYSTEM if options.prompts == PAPER else ""
    options.output = options.output or Path(f"paper-{options.model.resolve().name}")
    # An option repeated is the last one's; the table's order is the paper's.
    options.benchmarks = [name for name in BENCHMARKS if name in options.benchmarks]
    names = [name for name, _ in options.server]
    if len({*names}) != len(names):
        parser.error("--server: two rows have the same name")
    return options
