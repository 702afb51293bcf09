"""python -m benchmarks.accuracy {language,omni,report}: run missing methods, then write JSON, tables and plots."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.common.command import one_line_errors
from benchmarks.common.server import exit_on_signals

# Width of the output, in characters, if it does not go to a terminal.
LOG_WIDTH = 200


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of Settings."""
    from benchmarks.accuracy.settings import CALIBRATION_WINDOWS, Settings

    defaults = Settings()
    top = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--results", type=Path, default=defaults.results, help="directory of JSON, tables and plots")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--methods", help="names, separated by commas; default: all")
    running.add_argument("--work", type=Path, default=defaults.work, help="models, checkpoints, raw results")
    running.add_argument("--model", type=Path, help="Hugging Face directory of another model to measure")
    running.add_argument("--seed", type=int, default=defaults.seed)
    running.add_argument("--dtype", default=defaults.dtype, choices=("float32", "bfloat16", "float16"), help="in vLLM")
    running.add_argument("--window-tokens", type=int, default=defaults.window_tokens)
    language = commands.add_parser("language", parents=[shared, running], help="perplexity on several texts")
    language.add_argument("--texts", help="names, separated by commas; default: all")
    language.add_argument("--windows", type=int, default=defaults.windows, help="evaluation windows per text")
    windows = ",".join(f"{domain}={count}" for domain, count in CALIBRATION_WINDOWS.items())
    language.add_argument("--calibration", help=f"windows per domain (default {windows})")
    omni = commands.add_parser("omni", parents=[shared, running], help="questions over images, speech, clips and text")
    omni.add_argument(
        "--omni-work", type=Path, default=defaults.omni_work, help="work directory of benchmarks.models.tiny_omni"
    )
    omni.add_argument("--questions", type=int, default=defaults.questions, help="questions per kind")
    omni.add_argument("--batch-size", type=int, default=defaults.batch_size, help="batch of the simulated methods")
    commands.add_parser("report", parents=[shared], help="tables and plots of the kept results")
    return top


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _full_command(typed: list[str]) -> str:
    """The command that makes all results at once: as typed, but without the choice of methods and texts."""
    flags = ("--methods", "--texts")
    kept = [
        part
        for before, part in zip(["", *typed], typed, strict=False)
        if before not in flags and part.partition("=")[0] not in flags
    ]
    return shlex.join(["python", "-m", "benchmarks.accuracy", *kept])


def run(arguments: argparse.Namespace, command: str, console: Console) -> None:
    """Run a benchmark's missing methods one after the other, and write the summary after each."""
    from transformers.utils import logging as transformers_logging

    from benchmarks.accuracy import job as jobs
    from benchmarks.accuracy import language, omni
    from benchmarks.accuracy.methods import choose, known_methods
    from benchmarks.accuracy.reporting import report
    from benchmarks.accuracy.reporting.summary import summarize
    from benchmarks.accuracy.settings import Settings, parse_calibration
    from benchmarks.common.texts import EVALUATION

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    values = vars(arguments)
    given = {name: values[name] for name in Settings.__dataclass_fields__ if values.get(name) is not None}
    if "calibration" in given:
        given["calibration"] = parse_calibration(given["calibration"])
    settings = Settings(**given)
    settings.check()
    methods = choose("method", _names(arguments.methods), known_methods(arguments.command))
    if arguments.command == "language":
        wanted = choose("text", _names(arguments.texts), EVALUATION)
        job = language.prepare(settings)
    else:
        job = omni.prepare(settings)
        wanted = list(job.evaluations)
    for index, name in enumerate(methods, start=1):
        started = time.monotonic()
        jobs.run(job, name, wanted)
        console.print(f"{index}/{len(methods)} {name}: {time.monotonic() - started:.0f} s", highlight=False)
        report.write(summarize(job, command), settings.results)
    report.show(summarize(job, command), console)


def main() -> None:
    exit_on_signals()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = parser().parse_args()
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    with one_line_errors():
        if arguments.command == "report":
            from benchmarks.accuracy.reporting import report

            for summary in report.read(arguments.results):
                report.write(summary, arguments.results)
                report.show(summary, console)
        else:
            run(arguments, _full_command(sys.argv[1:]), console)


if __name__ == "__main__":
    main()
