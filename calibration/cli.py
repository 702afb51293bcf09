"""The command `morphoquant`: calibrate, inspect, report, verify."""

from __future__ import annotations

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

from morphoquant_vllm.errors import MorphoQuantError

if TYPE_CHECKING:
    from calibration.processes import Processes

app = typer.Typer(
    help="Make, show and check MorphoQuant checkpoints (4-bit weights, 4-bit activations).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Exit status of a run that a signal ended, less the signal's number.
_SIGNALLED = 128
_TERMINATED = _SIGNALLED + signal.SIGTERM

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A MorphoQuant checkpoint.")]


def _setting(flag: str, help_text: str) -> Any:
    """A flag that overrides the recipe's setting of the same name; the defaults stand in the recipe, once."""
    return typer.Option(flag, help=help_text, show_default=False)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face model directory.")],
    data: Annotated[
        list[Path],
        typer.Option("--data", help=".jsonl of conversations, .txt, or a directory of .txt; may be repeated."),
    ],
    output: Annotated[Path, typer.Option("--output", help="Directory of the new checkpoint.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file of settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older checkpoint at --output.")] = False,
    work: Annotated[
        Path | None, typer.Option("--work", help="Where finished blocks are kept until the end (default: OUTPUT.work).")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an earlier run finished.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out conversations whose media are missing or broken.")
    ] = False,
    memory_budget: Annotated[
        str | None,
        typer.Option("--memory-budget", help="Memory to keep to, e.g. 6GiB (default: what is free)."),
    ] = None,
    target: Annotated[
        list[str] | None, _setting("--target", "Pattern of linears to quantize; may be repeated.")
    ] = None,
    ignore: Annotated[
        list[str] | None, _setting("--ignore", "Pattern of linears to leave in 16 bit; may be repeated.")
    ] = None,
    tower: Annotated[
        list[str] | None, _setting("--tower", "Encoder to quantize besides: image; may be repeated (none).")
    ] = None,
    full_mask: Annotated[
        list[str] | None, _setting("--full-mask", "Pattern of linears whose every channel may escape; repeatable.")
    ] = None,
    group_size: Annotated[int | None, _setting("--group-size", "32 (default), 64 or 128.")] = None,
    tensor_parallel: Annotated[
        str | None, _setting("--tensor-parallel", "Ranks that may share the model: auto (default) or a number.")
    ] = None,
    escape_budget: Annotated[
        float | None, _setting("--escape-budget", "Part of a layer's codes that may take 8 bits (0.04).")
    ] = None,
    grid: Annotated[str | None, _setting("--grid", "How steps are found: budget (default) or reference.")] = None,
    massive_row: Annotated[
        bool | None, _setting("--massive-row/--no-massive-row", "A row of their own for massive tokens (yes).")
    ] = None,
    modality_rows: Annotated[
        bool | None, _setting("--modality-rows/--no-modality-rows", "Rows of their own for modalities (yes).")
    ] = None,
    row_margin: Annotated[
        float | None, _setting("--row-margin", "Error that such a row must save on held-back tokens (0.02).")
    ] = None,
    regression: Annotated[
        bool | None, _setting("--regression/--no-regression", "Weights make up for rounded activations (yes).")
    ] = None,
    shrinkage: Annotated[float | None, _setting("--shrinkage", "Pull to the original weights (0.02).")] = None,
    rounding: Annotated[
        str | None, _setting("--rounding", "compensated (default; GPTQ and refinement) or nearest.")
    ] = None,
    scale_levels: Annotated[
        int | None, _setting("--scale-levels", "Levels of two-level weight scales, up to 16; 0 (default): none.")
    ] = None,
    tau: Annotated[float | None, _setting("--tau", "Outlier threshold in standard deviations (2.0).")] = None,
    lam: Annotated[float | None, _setting("--lam", "Escape limit of the search (0.8).")] = None,
    lower: Annotated[float | None, _setting("--lower", "Smallest ratio of the range search (0.6).")] = None,
    lp_norm: Annotated[float | None, _setting("--lp-norm", "Power of the search's error (2).")] = None,
    max_samples: Annotated[int | None, _setting("--max-samples", "Conversations and windows used (128).")] = None,
    max_tokens: Annotated[int | None, _setting("--max-tokens", "Longest conversation in tokens (2048).")] = None,
    window_tokens: Annotated[int | None, _setting("--window-tokens", "Windows of .txt files in tokens (512).")] = None,
    sample_tokens: Annotated[int | None, _setting("--sample-tokens", "Tokens that are looked at (16384).")] = None,
    modality_balance: Annotated[
        float | None,
        _setting("--modality-balance", "1 (default): every modality counts the same; 0: every token does."),
    ] = None,
    seed: Annotated[int | None, _setting("--seed", "Seed of the choice of tokens (0).")] = None,
    dtype: Annotated[str | None, _setting("--dtype", "float32 (default), bfloat16 or float16.")] = None,
    device: Annotated[str | None, _setting("--device", "auto (default), cpu or cuda.")] = None,
    shard_size: Annotated[str | None, _setting("--shard-size", "Largest weight file (4GB).")] = None,
) -> None:
    """Calibrate MODEL on example data and write a W4A4 checkpoint that vLLM serves.

    Under torchrun, its processes share the work: torchrun --nproc-per-node 4 -m calibration calibrate ...
    """
    from calibration.processes import open_processes
    from calibration.progress import BlockProgress
    from calibration.recipe import read_recipe, read_size

    flags = {
        "targets": target or None,
        "ignore": ignore or None,
        "towers": tower or None,
        "full_mask": full_mask or None,
        "group_size": group_size,
        "tensor_parallel": _number_or_word(tensor_parallel),
        "escape_budget": escape_budget,
        "grid": grid,
        "massive_row": massive_row,
        "modality_rows": modality_rows,
        "row_margin": row_margin,
        "regression": regression,
        "shrinkage": shrinkage,
        "rounding": rounding,
        "scale_levels": scale_levels,
        "tau": tau,
        "lam": lam,
        "lower": lower,
        "lp_norm": lp_norm,
        "max_samples": max_samples,
        "max_tokens": max_tokens,
        "window_tokens": window_tokens,
        "sample_tokens": sample_tokens,
        "modality_balance": modality_balance,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "shard_size": shard_size,
    }
    with open_processes() as processes, _one_word_of_failure(processes):
        settings = read_recipe(recipe, flags)
        budget = None if memory_budget is None else read_size("--memory-budget", memory_budget)

        from transformers.utils import logging as transformers_logging

        from calibration.calibrate import calibrate as run

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("calibration").setLevel(logging.INFO if processes.first else logging.WARNING)
        # It warns that weights stay in their files, which is what we ask of it.
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        with BlockProgress(Console(stderr=True, quiet=not processes.first)) as progress:
            report = run(
                model,
                data,
                output,
                recipe=settings,
                overwrite=overwrite,
                work=work,
                restart=restart,
                skip_bad=skip_bad,
                memory_budget=budget,
                on_block=progress,
                processes=processes,
            )
        if processes.first:
            typer.echo(f"{output}: {len(report['layers'])} layers quantized, escape rate {report['escape_rate']:.2%}")


@contextmanager
def _one_word_of_failure(processes: Processes) -> Iterator[None]:
    """Where several processes fail together, the first one says why, before any of them ends."""
    try:
        with processes.failing_together():
            yield
    except MorphoQuantError as error:
        if not processes.told:
            raise
        if processes.first:
            _say(str(error))
        processes.part()
        raise typer.Exit(1) from error
    except SystemExit as stop:
        if processes.size > 1 and processes.first and stop.code == _TERMINATED:
            _say("ended by SIGTERM, which torchrun sends where another process has died; the same command goes on")
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
    from calibration.output.page.render import write_page

    place = output or Path(f"{directory.resolve().name}-report.html")
    content = write_page(directory, place, layer or (), overwrite=overwrite)
    typer.echo(f"{place}: {len(content.inputs)} inputs, {len(content.chosen)} drawn channel by channel")


@app.command()
def verify(directory: Directory) -> None:
    """Check a checkpoint: names, shapes, code ranges, finite values, shards of fused layers, tensor-parallel rules."""
    from morphoquant_vllm.format.verify import OLD_VERSION, verify_checkpoint

    spec = verify_checkpoint(directory)
    typer.echo(f"{directory}: {len(spec.layers)} quantized layers, all in order")
    if spec.integrity is None:
        typer.echo(f"{directory}: {OLD_VERSION}")


def _number_or_word(value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdecimal() else value


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_SIGNALLED + number)


def main() -> None:
    """Entry point: what the user can mend ends in one line on stderr and exit status 1."""
    # A terminated run takes its half-written directory with it.
    signal.signal(signal.SIGTERM, _stop)
    # Before torch is imported: its threads spin while they wait, which is slow where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except MorphoQuantError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"the Python package '{error.name}' is missing; install morphoquant-vllm[calibration]")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _say(message: str) -> None:
    # What comes now is the end, into which torchrun's own signal to end must not break.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    _say(message)
    sys.exit(1)
