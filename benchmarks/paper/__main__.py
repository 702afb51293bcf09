"""python -m benchmarks.paper --model DIR --data DIR: calibrate, serve, ask four benchmarks, print the paper's table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.common.command import one_line_errors
from benchmarks.common.files import file_digest, weight_bytes, write_atomically, write_results
from benchmarks.common.machine import machine, versions
from benchmarks.common.server import exit_on_signals
from benchmarks.paper import calibration, model, rows, table
from benchmarks.paper.options import parse
from benchmarks.paper.plan import describe_calibration, gpu_bytes, make_plan
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE

RUN_FILE, LOCK_FILE = "run.json", ".lock"
OURS, SIXTEEN_BIT = "MorphoQuant for vLLM", "16 bit, vLLM"


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Hold the output directory for this run; MorphoQuantError if another run does."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK_FILE, timeout=0):
            yield
    except Timeout as error:
        raise MorphoQuantError(f"{output}: another run is at work there; wait, or choose another --output") from error


def keep_settings(options: Any) -> None:
    """Write the run's settings to OUTPUT, or compare them; MorphoQuantError if OUTPUT belongs to another run."""
    place = options.output / RUN_FILE
    own = options.calibration_data
    settings = {
        "model": model.identity(options.model),
        "scienceqa": options.scienceqa,
        "calibration_data": None if own is None else file_digest(own),
        "hold_out": options.hold_out,
        "calibrate_arguments": options.calibrate_arguments,
        "serve_arguments": options.serve_arguments,
        "limit": options.limit,
        "max_tokens": options.max_tokens,
        "skip_missing": options.skip_missing,
    }
    if place.is_file():
        earlier = json.loads(place.read_text(encoding="utf-8"))
        changed = sorted(key for key in settings if earlier.get(key) != settings[key])
        if changed:
            raise MorphoQuantError(
                f"{options.output}: holds a run with another {', '.join(changed)}; choose another --output"
            )
    else:
        write_atomically(place, json.dumps(settings, indent=1) + "\n")


def all_rows(options: Any) -> list[rows.Row]:
    """The rows in the order in which they are asked."""
    own = [
        rows.Row(SIXTEEN_BIT, options.output / "rows" / "16-bit", options.model),
        rows.Row(OURS, options.output / "rows" / "morphoquant", options.output / calibration.CHECKPOINT),
    ]
    others = [rows.Row(name, options.output / "rows" / f"server-{name}", url=url) for name, url in options.server]
    return [*own[options.without_16_bit :], *others]


def described(row: rows.Row, summaries: dict[str, Any], options: Any, seconds: float) -> dict[str, Any]:
    """An entry of the result: figures, and the size and bits of the model behind them."""
    found: dict[str, Any] = {"name": row.name, "bits": "?", "source": row.url or "this run", "benchmarks": summaries}
    if row.model is None:
        return found
    found["bytes"] = weight_bytes(row.model)
    if row.model == options.model:
        return {**found, "bits": "16/16"}
    report = json.loads((row.model / REPORT_FILE).read_text(encoding="utf-8"))
    return {**found, "bits": "4/4", "escape_rate": report["escape_rate"], "calibration_seconds": seconds}


def run(options: Any, console: Console) -> None:
    """The whole run; each step continues an earlier run that was cut off."""
    sources: dict[str, Any] = {}
    data, arguments = options.calibration_data, options.calibrate_arguments
    if data is None:
        sources = calibration.prepare(options.data, options.output, options.benchmarks, options)
        data, arguments = [options.output / calibration.DATA_FILE], [*calibration.ARGUMENTS, *arguments]
    console.print(f"calibration: {options.output / calibration.LOG_FILE} has its progress", highlight=False)
    seconds = calibration.calibrate(options.model, data, options.output, arguments)
    found = []
    for row in all_rows(options):
        summaries = rows.ask(row, options, sources.get("held_out", {}), console)
        found.append(described(row, summaries, options, seconds))
    result = {
        "title": f"{options.model.resolve().name}: the paper's table with our rows",
        "benchmarks": options.benchmarks,
        "machine": machine(),
        "gpu_bytes": gpu_bytes(),
        "versions": versions(),
        "calibration": sources,
        "paper": table.paper_rows(),
        "rows": found,
        "notes": [*table.notes(options, sources, describe_calibration(options)), f"Machine: {machine()}."],
    }
    markdown = table.render(result)
    paths = write_results(options.output, "table", result, markdown)
    print(markdown)
    for path in paths:
        print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print missing files and estimates. Then run, unless it is a dry run or something is missing."""
    console = Console(stderr=True, soft_wrap=True)
    # transformers would warn of token ids of the published config.
    transformers_logging.set_verbosity_error()
    with one_line_errors():
        options = parse(arguments, __doc__)
        folders = [row.folder for row in all_rows(options)]
        plan = make_plan(options, rows.measured_rates(folders, options.benchmarks))
        plan.notes.append(describe_calibration(options))
        for line in plan.lines():
            print(line, flush=True)
        if plan.missing:
            raise MorphoQuantError(f"{len(plan.missing)} missing, each listed above; nothing was begun")
        if options.dry_run:
            print("dry run: nothing is missing; nothing was begun")
            return
        exit_on_signals()
        with held(options.output):
            keep_settings(options)
            try:
                run(options, console)
            except KeyboardInterrupt:
                sys.exit("interrupted; finished steps are kept: run the same command again to go on")


if __name__ == "__main__":
    main()
