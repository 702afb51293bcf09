"""The command `morphoquant`: doctor, calibrate, inspect, report, verify, convert, compare."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from calibration.settings.flags import chosen, with_setting_flags
from calibration.settings.recipe import read_recipe, read_size
from morphoquant_vllm import environment
from morphoquant_vllm.errors import MorphoQuantError, missing_package, one_line

if TYPE_CHECKING:
    from calibration.processes import Processes

app = typer.Typer(
    help="Make, show and check MorphoQuant checkpoints (4-bit weights, 4-bit activations).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Exit status of a run that a signal ended, minus the signal's number.
_SIGNALLED = 128
_TERMINATED = _SIGNALLED + signal.SIGTERM

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A MorphoQuant checkpoint.")]


@app.command()
@with_setting_flags
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face model directory.")],
    data: Annotated[
        list[Path], typer.Option(help="Conversations (.jsonl, .json, .parquet), .txt, a folder of .txt; repeatable.")
    ],
    output: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older checkpoint at --output.")] = False,
    work: Annotated[Path | None, typer.Option(help="Directory of finished blocks (default: OUTPUT.work).")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the finished blocks of an earlier run.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out conversations that cannot be used.")] = False,
    memory_budget: Annotated[str | None, typer.Option(help="Memory to keep to, as 6GiB (default: all free).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done and needed; write nothing.")
    ] = False,
    **settings: Any,
) -> None:
    """Calibrate MODEL on example data and write a W4A4 checkpoint that vLLM serves.

    Under torchrun, its processes share the work: torchrun --nproc-per-node 4 -m calibration calibrate ...
    """
    from calibration.processes import open_processes
    from calibration.progress import BlockProgress

    with open_processes() as processes, _one_failure_message(processes):
        chosen_recipe = read_recipe(recipe, chosen(settings))
        budget = None if memory_budget is None else read_size("--memory-budget", memory_budget)
        # Imported here: it imports torch, which takes seconds.
        from calibration.calibrate import calibrate as run
        from calibration.calibrate import dry_run as foresee
        from calibration.output.outcome import outcome_lines

        _set_log_levels(processes)
        places: dict[str, Any] = {"overwrite": overwrite, "work": work, "skip_bad": skip_bad, "memory_budget": budget}
        if dry_run:
            if processes.first:
                typer.echo("\n".join(foresee(model, data, output, recipe=chosen_recipe, **places).lines()))
            return
        with BlockProgress(Console(stderr=True, quiet=not processes.first)) as progress:
            report = run(
                model,
                data,
                output,
                recipe=chosen_recipe,
                restart=restart,
                on_block=progress,
                on_layer=progress.begin,
                processes=processes,
                **places,
            )
        if processes.first:
            typer.echo("\n".join(outcome_lines(report, output)))


def _set_log_levels(processes: Processes) -> None:
    """Let the first process log progress; silence library messages that do not help a user."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("calibration").setLevel(logging.INFO if processes.first else logging.WARNING)
    # accelerate warns that weights stay in their files, which is intended.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def _one_failure_message(processes: Processes) -> Iterator[None]:
    """If several processes fail together, the first one prints the reason before any of them ends."""
    try:
        with processes.failing_together():
            yield
    except MorphoQuantError as error:
        if not processes.failure_announced:
            raise
        if processes.first:
            _print_error(str(error))
        processes.wait_for_peers()
        raise typer.Exit(1) from error
    except SystemExit as stop:
        if processes.size > 1 and processes.first and stop.code == _TERMINATED:
            _print_error(
                "ended by SIGTERM, which torchrun sends if another process has died; the same command resumes the run"
            )
        raise


@app.command()
def inspect(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show a checkpoint's layers: shapes, group, masked channels, escape rate, sizes against 16 bit."""
    from calibration.output.inspection import inspect_data, inspect_table

    if as_json:
        typer.echo(json.dumps(inspect_data(directory), indent=2))
        return
    Console().print(inspect_table(directory))


@app.command()
def report(
    directory: Directory,
    output: Annotated[
        Path | None, typer.Option("--output", help="The HTML file (default: DIR's name with -report.html, here).")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", help="Pattern of layers to draw channel by channel; may be repeated (default: six)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write one self-contained HTML page: distributions, grids, escapes, errors, sizes, settings."""
    from calibration.output.page.render import write_report

    place = output or Path(f"{Path(os.path.realpath(directory)).name}-report.html")
    content = write_report(directory, place, layer or (), overwrite=overwrite)
    typer.echo(f"{one_line(str(place))}: {len(content.inputs)} inputs, {len(content.chosen)} drawn channel by channel")


@app.command()
def verify(directory: Directory) -> None:
    """Check a checkpoint: names, shapes, code ranges, finite values, shards of fused layers, tensor-parallel rules."""
    from morphoquant_vllm.format.verify import remarks, verify_checkpoint

    spec = verify_checkpoint(directory)
    shown = one_line(str(directory))
    count = sum(settings.count for settings in spec.experts.values())
    experts = f" and {count} experts" if count else ""
    wide = sum(layer.weight_bits == 8 for layer in spec.layers.values())
    bits = f" ({wide} with 8-bit weights)" if wide else ""
    typer.echo(f"{shown}: {len(spec.layers)} quantized layers{bits}{experts}, all in order")
    for line in remarks(directory, spec):
        typer.echo(f"{shown}: {line}")


@app.command()
def convert(
    directory: Directory,
    output: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    scales: Annotated[
        str | None, typer.Option(help="two-level: make the layers' group scales two-level if that is exact.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Fit two-level scales to the layers that have no exact ones.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older checkpoint at --output.")] = False,
) -> None:
    """Rewrite a checkpoint in the newest format, in which damage is noticed; weights do not change."""
    from calibration.output.convert import convert as run

    done = run(directory, output, scales=scales, approximate=approximate, overwrite=overwrite)
    typer.echo(f"{output}: {done}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint or 16-bit model: the measure.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another form of the same model.")],
    data: Annotated[
        list[Path], typer.Option(help="Conversations (.jsonl, .json, .parquet), .txt, a folder of .txt; repeatable.")
    ],
    output: Annotated[Path | None, typer.Option("--output", help="Write an HTML page to this file, too.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Number of samples (default: all).")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out conversations that cannot be used.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Compare two forms of a model on data: divergence and perplexity by modality, errors by decoder block.

    Both are loaded by transformers, on the CPU. Quantized linears compute on the kernels that serve them.
    """
    from calibration.compare.run import compare_models
    from calibration.compare.show import comparison_table, render
    from calibration.output.page_file import check_page, write_page
    from calibration.processes import ONE

    if output is not None:
        check_page(output, overwrite=overwrite)
    _set_log_levels(ONE)
    found = compare_models(
        first, second, data, max_samples=max_samples, max_tokens=max_tokens, dtype=dtype, skip_bad=skip_bad
    )
    # Printed first: whatever happens to the page, the figures are there.
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(comparison_table(found))
    if output is not None:
        write_page(render(found), output, overwrite=overwrite)


@app.command()
def doctor(
    model: Annotated[
        Path | None, typer.Option("--model", help="Checkpoint or model directory whose need is examined, too.")
    ] = None,
    mend: Annotated[bool, typer.Option("--mend", help="First remove the known faults of vLLM's environment.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show whether this machine can serve: processor, compiler, GPU, vLLM, cache, media; exit status 0 or 1."""
    from morphoquant_vllm.doctor import server
    from morphoquant_vllm.doctor.examine import as_json as json_object
    from morphoquant_vllm.doctor.examine import as_text, examine, is_healthy
    from morphoquant_vllm.doctor.memory import read_model

    if mend:
        for line in server.mend_all():
            typer.echo(f"mending {line}", err=True)
    served = None if model is None else read_model(model)
    findings = examine(served)
    if served is not None and not served.is_quantized:
        from calibration.examination import calibrating

        findings += calibrating(served.directory)
    typer.echo(json.dumps(json_object(findings), indent=2) if as_json else as_text(findings))
    if not is_healthy(findings):
        raise typer.Exit(1)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_SIGNALLED + number)


def main() -> None:
    """Entry point: a problem that the user can fix ends in one line on stderr and exit status 1."""
    # The terminal's encoding may lack a letter of a file name.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # On SIGTERM, raise SystemExit, which removes the half-written output directory.
    signal.signal(signal.SIGTERM, _stop)
    # Before torch is imported: its threads spin while they wait, which is slow if cores are shared.
    environment.wait_passively()
    try:
        app()
    except MorphoQuantError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(missing_package(error.name, "calibration"))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _print_error(message: str) -> None:
    # The process is about to end; torchrun's SIGTERM must not interrupt the message.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The system's messages contain raw file names.
    print(f"error: {one_line(' '.join(message.split()))}", file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    _print_error(message)
    sys.exit(1)
