"""python -m benchmarks.calibrate: generate models of real size, time their calibration, and ask one in vLLM.

generate   write a model in the published layout of Qwen2.5-Omni, with seeded weights
measure    seconds and peak memory of calibrating it, by block, against a bound (the default)
quick      a checkpoint of it that is calibrated as cheaply as can be, to load and not to judge
serve      load a checkpoint in vLLM, ask it about an image and a sound; time and memory
report     write the summary and the plot of a measurement that is kept
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.calibrate.model.layouts import LAYOUTS
from benchmarks.common.command import one_line_errors

if TYPE_CHECKING:
    from benchmarks.calibrate.timing.measure import Measured
    from benchmarks.calibrate.timing.worker import Job

RESULTS = Path("benchmarks/results/calibrate")
WORK = Path(".cache/calibrate")
# The cheapest calibration that the format allows: it shows that a checkpoint loads, not its accuracy.
QUICK = {
    "effort": "fast",
    "rounding": "nearest",
    "regression": False,
    "modality_rows": False,
    "max_samples": 2,
    "window_tokens": 32,
    "max_tokens": 32,
    "sample_tokens": 64,
}
say = partial(print, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="write a generated model")
    generate.add_argument("--layout", default="3B", help=f"one of {', '.join(LAYOUTS)}")
    generate.add_argument("--layers", type=int, help="number of decoder blocks, of the real width")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--output", type=Path, required=True)

    measure = commands.add_parser("measure", help="time a calibration (the default)")
    measure.add_argument("--layout", default="3B", help=f"one of {', '.join(LAYOUTS)}; generated if it is missing")
    measure.add_argument("--layers", type=int, help="number of the model's decoder blocks")
    measure.add_argument("--blocks", type=int, help="stop after this many blocks; the total is extrapolated")
    measure.add_argument("--samples", type=int, default=64)
    measure.add_argument("--tokens", type=int, default=512, help="of each sample")
    measure.add_argument(
        "--media", type=int, help="samples with an image and a sound (default 8; 0 for a decoder without towers)"
    )
    measure.add_argument("--cores", type=int, default=2)
    measure.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="of the recipe")
    measure.add_argument("--memory-budget", type=float, metavar="GIB", help="memory that the calibration may use")
    measure.add_argument("--fresh", action="store_true", help="discard earlier measurements and calibrated blocks")
    measure.add_argument("--work", type=Path, default=WORK, help="folder of models, data and checkpoints")
    measure.add_argument("--results", type=Path, default=RESULTS)
    measure.add_argument("--name", default="calibrate", help="of the result files")

    quick = commands.add_parser("quick", help="a cheaply calibrated checkpoint")
    quick.add_argument("model", type=Path)
    quick.add_argument("--output", type=Path, required=True)
    quick.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="of the recipe")
    quick.add_argument("--overwrite", action="store_true")

    serve = commands.add_parser("serve", help="ask a checkpoint in vLLM")
    serve.add_argument("checkpoint", type=Path)
    serve.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    serve.add_argument("--kv-gib", type=int, default=1, help="size of the key-value cache")
    serve.add_argument("--answer-tokens", type=int, default=8)
    serve.add_argument("--timeout", type=float, default=1800, help="seconds for loading, and for the request")
    serve.add_argument("--log", type=Path, default=WORK / "serve.log")
    serve.add_argument("--results", type=Path, default=RESULTS)
    serve.add_argument("--name", default="serve", help="of the result files")

    report = commands.add_parser("report", help="write a kept measurement's summary and plot again")
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--name", default="calibrate", help="of the result files")
    return top


def settings(pairs: list[str]) -> dict[str, Any]:
    """Recipe settings of SETTING=VALUE arguments; values are YAML."""
    from morphoquant_vllm.errors import MorphoQuantError

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise MorphoQuantError(f"--set {pair}: write SETTING=VALUE, such as dtype=bfloat16")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise MorphoQuantError(f"--set {pair}: the value is not YAML; put text with signs in quotes") from error
    return found


def run_generate(arguments: argparse.Namespace) -> None:
    """The model and its directory."""
    from benchmarks.calibrate.model.generate import generate

    say(generate(arguments.layout, arguments.output, layers=arguments.layers, seed=arguments.seed, progress=say))


def media_of(arguments: argparse.Namespace) -> int:
    """Samples with media to measure with; MorphoQuantError if the layout takes text alone."""
    from benchmarks.calibrate.model.layouts import DECODERS
    from morphoquant_vllm.errors import MorphoQuantError

    text_alone = arguments.layout in DECODERS
    if text_alone and arguments.media:
        raise MorphoQuantError(
            f"--media {arguments.media}: the layout {arguments.layout} takes text alone; leave --media out"
        )
    return arguments.media if arguments.media is not None else 0 if text_alone else 8


def measured_job(arguments: argparse.Namespace, job: Job) -> Measured:
    """The measurement of a calibration, which is kept; earlier ones are discarded first if that is asked."""
    from benchmarks.calibrate.serve import note_origin
    from benchmarks.calibrate.timing.measure import measure
    from benchmarks.common.files import code_digest

    # Times of changed code are times of something else.
    state = code_digest([Path("calibration"), Path("morphoquant_vllm/numerics")])[:12]
    kept, output = arguments.work / f"measured-{state}", Path(job.output)
    if arguments.fresh:
        for directory in (kept, output, output.with_name(f"{output.name}.work")):
            shutil.rmtree(directory, ignore_errors=True)
    measured = measure(job, kept, say)
    note_origin(Path(job.model), output)
    return measured


def run_measure(arguments: argparse.Namespace, command: str) -> None:
    """Generate missing models and data, measure, write the files."""
    from benchmarks.calibrate.data import write_data
    from benchmarks.calibrate.model.generate import generate
    from benchmarks.calibrate.model.layouts import layout_config, text_config
    from benchmarks.calibrate.report import write
    from benchmarks.calibrate.summary import summarise
    from benchmarks.calibrate.timing.bound import Decoder
    from benchmarks.calibrate.timing.worker import Job
    from benchmarks.common.machine import load, machine, versions
    from calibration.settings.recipe import read_recipe

    media = media_of(arguments)
    sizes = {"max_samples": arguments.samples, "max_tokens": arguments.tokens, "window_tokens": arguments.tokens}
    # Blocks are measured, some of them: learning goes over all.
    changes = {"effort": "fast", **sizes, **settings(arguments.set)}
    recipe = read_recipe(overrides=changes)
    config = layout_config(arguments.layout, arguments.layers)
    published = text_config(layout_config(arguments.layout))["num_hidden_layers"]
    name = arguments.layout + (f"-{arguments.layers}-blocks" if arguments.layers else "")
    model, output = arguments.work / name, arguments.work / f"{name}-MorphoQuant"
    if not model.exists():
        say(f"generating {model}")
        generate(arguments.layout, model, layers=arguments.layers, progress=say)
    busy = load()
    shape = f"{arguments.samples}x{arguments.tokens}-{media}"
    data = write_data(arguments.work / f"data-{shape}", model, arguments.samples, arguments.tokens, media)
    budget = None if arguments.memory_budget is None else round(arguments.memory_budget * 2**30)
    job = Job(str(model), [str(path) for path in data], str(output), changes, arguments.cores, arguments.blocks, budget)
    measured = measured_job(arguments, job)
    decoder = Decoder.of(text_config(config))
    result = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        **busy,
        "cores": arguments.cores,
        "layout": arguments.layout,
        "model": name,
        "samples": arguments.samples,
        "tokens": arguments.tokens,
        "media": media,
        "memory_budget": budget,
        "recipe": recipe.model_dump(mode="json"),
        **summarise(measured, decoder, published, arguments.samples, arguments.tokens, recipe.model_dump(mode="json")),
    }
    for path in write(result, arguments.results, arguments.name):
        say(path)


def run_report(arguments: argparse.Namespace) -> None:
    """The summary and the plot, from the JSON that `measure` left."""
    from benchmarks.calibrate.report import write
    from benchmarks.common.files import read_result

    for path in write(read_result(arguments.results, arguments.name), arguments.results, arguments.name):
        say(path)


def run_quick(arguments: argparse.Namespace) -> None:
    """A cheaply calibrated checkpoint of a generated model; the same command goes on after one that was cut short."""
    from transformers.utils import logging as transformers_logging

    from benchmarks.calibrate.data import write_data
    from benchmarks.calibrate.serve import note_origin
    from calibration.calibrate import calibrate
    from calibration.settings.recipe import read_recipe

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = read_recipe(overrides={**QUICK, **settings(arguments.set)})
    # Beside the output, as the work: a run goes on with data of the same names alone.
    output = arguments.output.resolve()
    directory = output.with_name(f"{output.name}.data")
    calibrate(
        arguments.model,
        write_data(directory, arguments.model, recipe.max_samples, recipe.window_tokens, 0),
        arguments.output,
        recipe=recipe,
        overwrite=arguments.overwrite,
        on_block=lambda result: say(f"block {result.index + 1}/{result.count}"),
    )
    note_origin(arguments.model, arguments.output)
    shutil.rmtree(directory)
    say(arguments.output)


def run_serve(arguments: argparse.Namespace, command: str) -> None:
    """Ask, write the files."""
    from benchmarks.calibrate.serve import ask, markdown
    from benchmarks.common.files import write_results
    from benchmarks.common.machine import machine, versions
    from benchmarks.common.server import ServerError
    from morphoquant_vllm.errors import MorphoQuantError

    try:
        answered = ask(
            arguments.checkpoint,
            arguments.log,
            dtype=arguments.dtype,
            kv_gib=arguments.kv_gib,
            answer_tokens=arguments.answer_tokens,
            timeout=arguments.timeout,
        )
    except ServerError as error:
        raise MorphoQuantError(f"{arguments.checkpoint}: vLLM did not come up; why is in {arguments.log}") from error
    result = {"command": command, "machine": machine(), "versions": versions()} | answered
    for path in write_results(arguments.results, arguments.name, result, markdown(result)):
        say(path)


def main() -> None:
    """Run the command of the command line; without one, measure."""
    given = sys.argv[1:]
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["measure", *given]
    arguments = parser().parse_args(given)
    os.environ["HF_HUB_OFFLINE"] = "1"
    command = "python -m benchmarks.calibrate " + shlex.join(given)
    with one_line_errors():
        if arguments.command == "generate":
            run_generate(arguments)
        elif arguments.command == "measure":
            run_measure(arguments, command)
        elif arguments.command == "quick":
            run_quick(arguments)
        elif arguments.command == "report":
            run_report(arguments)
        else:
            run_serve(arguments, command)


if __name__ == "__main__":
    from benchmarks.common.server import exit_on_signals

    # Ended by a signal too, no server and no calibration may stay behind.
    exit_on_signals()
    # The published config has token ids that it finds strange.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
