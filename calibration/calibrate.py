"""`calibrate`: from a model directory and example data to a MorphoQuant checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from calibration.blocks.results import BlockResult, LayerBegins
from calibration.data.conversations import CLASSES, Conversation, PlainText
from calibration.data.data_files import load_conversations
from calibration.data.rendering import without_values
from calibration.data.token_choice import DrawnTokens
from calibration.forecast import Forecast, forecast
from calibration.job import Job
from calibration.learn.stage import learn
from calibration.model.bits import check_bits_budget, extra_bytes
from calibration.model.block_loader import BlockLoader
from calibration.model.discovery import GENERIC, choose_architecture
from calibration.model.loading import choose_device
from calibration.model.plan import check_carried, decoder_names, plan, sixteen_bit
from calibration.model.refusals import check_weight_names
from calibration.model.served_names import check_names
from calibration.model.source import open_source
from calibration.output.export import checkpoint_size, quantized_size
from calibration.output.places import check_free_space, check_name, check_output, check_room, check_writable
from calibration.output.report import PACKAGE, package_version
from calibration.precision import spend_budgets
from calibration.processes import ONE, Processes
from calibration.settings.recipe import Recipe
from calibration.stages import capture, export, prepare, quantize
from calibration.work.directory import WorkDirectory
from calibration.work.fingerprint import fingerprint
from calibration.work.opening import clear_work, open_work
from calibration.work.rendered import media_bytes
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE, read_json
from morphoquant_vllm.format.verify import check_beside

logger = logging.getLogger(__name__)


def calibrate(
    model: Path | str,
    data: Path | str | Iterable[Path | str],
    output: Path | str,
    *,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    work: Path | str | None = None,
    restart: bool = False,
    skip_bad: bool = False,
    memory_budget: int | None = None,
    on_block: Callable[[BlockResult], None] | None = None,
    on_layer: Callable[[LayerBegins], None] | None = None,
    processes: Processes = ONE,
) -> dict[str, Any]:
    """Make a MorphoQuant checkpoint of the model directory `model` in the directory `output`.

    `data` names files of conversations (.jsonl, .json, .parquet), .txt files, or directories of .txt files.
    Conversations that cannot be used are refused, or left out with `skip_bad`. The directory `work` (default: `output`
    with .work at its end) keeps finished blocks until the checkpoint is complete. If a run is interrupted in any way,
    the same call resumes it from there, unless `restart`. `memory_budget` is in bytes: to keep it, towers and hidden
    states are read from disk if necessary. It changes no byte of the result, unless learning does not fit.

    With several `processes` (processes.open_processes), each makes the same call and takes its share of the samples.
    `memory_budget` is then the total for the processes of one machine.

    `on_block` is called after each decoder block, `on_layer` before each input of a block is quantized. Returns the
    report that is also written to morphoquant_calibration.json. Raises MorphoQuantError for problems that the user can
    fix. After any failure, `output` is as it was before.
    """
    output = Path(output)
    job = plan_job(model, recipe or Recipe(), memory_budget, processes)
    # A link leads to the place that is meant, for example on a larger disk; its own name cannot be removed.
    work_path = Path(os.path.realpath(work if work is not None else default_work(output)))
    conversations = _checked_data(job, data, output, work_path, overwrite=overwrite, skip_bad=skip_bad)
    with _opened_work(job, conversations, output, work_path, restart=restart, skip_bad=skip_bad) as opened:
        if opened.exported:
            return processes.broadcast(lambda: _finish(work_path, read_json(output / REPORT_FILE)))
        processes.broadcast(lambda: check_output(output, job.source.directory, overwrite=overwrite))
        done, tokens = _quantize_model(job, opened, conversations, skip_bad, on_block, on_layer)
        return processes.broadcast(
            lambda: _finish(work_path, export(done, opened, tokens, output, overwrite=overwrite))
        )


def dry_run(
    model: Path | str,
    data: Path | str | Iterable[Path | str],
    output: Path | str,
    *,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    work: Path | str | None = None,
    skip_bad: bool = False,
    memory_budget: int | None = None,
) -> Forecast:
    """What `calibrate` with the same arguments would do and need; it writes nothing and loads no weights.

    Raises MorphoQuantError for the model, settings, data, places and memory that would end that call before its first
    block. It reads neither the weights' values nor the work directory.
    """
    output = Path(output)
    job = plan_job(model, recipe or Recipe(), memory_budget, ONE)
    work_path = Path(work) if work is not None else default_work(output)
    _check_places(job, output, work_path, overwrite=overwrite)
    conversations = load_conversations(data, skip_bad=skip_bad)
    samples, tokens = prepare(job, conversations, without_values, skip_bad=skip_bad)
    expected = forecast(job, tokens, sum(media_bytes(sample.inputs) for sample in samples))
    check_free_space(work_path, expected.work, "the work directory", "--work")
    return expected


def plan_job(model: Path | str, recipe: Recipe, memory_budget: int | None, processes: Processes) -> Job:
    """The job of this run: which layers are quantized, and how, by the model's config and the recipe."""
    device = choose_device(recipe.device, processes)
    source = open_source(model)
    if source.fp8 and processes.first:
        logger.info("%s: its weights are %s and are read as bfloat16", source.directory, source.fp8)
    architecture = choose_architecture(source, recipe)
    check_weight_names(architecture, source.tensors)
    spec = plan(architecture, source.config, source.tensors, recipe, created_by=f"{PACKAGE} {package_version()}")
    names = decoder_names(architecture, source.config, source.tensors)
    check_carried(source.tensors, spec)
    # They are copied, and the finished checkpoint would be refused for them.
    check_beside(source.directory, source.config, spec)
    check_bits_budget(spec, names.prefix, recipe)
    # A loader that was made has found every tensor of every block.
    processes.broadcast(lambda: len(BlockLoader(architecture, source, names, recipe, torch.device("cpu"))))
    if not architecture.verified:
        if processes.first:
            logger.info("%s: %s", source.config.get("model_type"), GENERIC)
            if architecture.remote_code:
                logger.warning("%s of the model's directory runs: --trust-remote-code", architecture.remote_code)
        processes.broadcast(lambda: check_names(source, spec))
    for name, in_features in sixteen_bit(architecture, names, source.tensors).items():
        if processes.first:
            logger.info("%s stays in 16 bit: no group size divides its K = %d", name, in_features)
    if device.type == "cuda" and memory_budget is not None:
        share = min(1.0, memory_budget / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.set_per_process_memory_fraction(share, device)
    return Job(source, architecture, names, spec, recipe, memory_budget, device, processes)


def _check_places(job: Job, output: Path, work_path: Path, *, overwrite: bool) -> None:
    """Refuse an output or a work directory that could not be written at the end of the work."""
    check_name(output)
    check_name(work_path)
    check_work(work_path, output, job.source.directory)
    check_writable(output, "--output", replaced=True)
    check_writable(work_path, "--work", replaced=False)
    # The checkpoint may already exist, if only the end of its run was cut off.
    if not work_path.exists():
        check_output(output, job.source.directory, overwrite=overwrite)
        more = extra_bytes(job.spec, job.names.prefix, job.recipe)
        sizes = (checkpoint_size(job.source, job.spec), quantized_size(job.source, job.spec))
        check_room(output, work_path, *(size + more for size in sizes))


def _checked_data(
    job: Job,
    data: Path | str | Iterable[Path | str],
    output: Path,
    work_path: Path,
    *,
    overwrite: bool,
    skip_bad: bool,
) -> Sequence[Conversation | PlainText]:
    """The conversations of `data`; places and weights that would end the run later are refused before."""
    job.processes.broadcast(lambda: _check_places(job, output, work_path, overwrite=overwrite))
    # Block loading would find NaN only hours later, and would not check carried tensors at all.
    job.processes.broadcast(job.source.check_finite)
    return job.processes.broadcast(lambda: load_conversations(data, skip_bad=skip_bad), CLASSES)


@contextmanager
def _opened_work(
    job: Job,
    conversations: Sequence[Conversation | PlainText],
    output: Path,
    work_path: Path,
    *,
    restart: bool,
    skip_bad: bool,
) -> Iterator[WorkDirectory]:
    """Hold the run's work directory, and compute on as many threads as the run that began it."""
    processes = job.processes
    found = (
        fingerprint(job.recipe, job.device, job.source, conversations, skip_bad=skip_bad, processes=processes.size)
        if processes.first
        else {}
    )
    with (
        open_work(work_path, found, job.device, job.names.blocks, output, restart=restart, processes=processes) as work,
        _threads(work.threads),
    ):
        yield work


def _quantize_model(
    job: Job,
    work: WorkDirectory,
    conversations: Sequence[Conversation | PlainText],
    skip_bad: bool,
    on_block: Callable[[BlockResult], None] | None,
    on_layer: Callable[[LayerBegins], None] | None,
) -> tuple[Job, DrawnTokens]:
    """Run the stages that leave quantized layers in `work`; the job with its budgets spent, and the drawn tokens."""
    with _explain_memory_errors(job):
        tokens = capture(job, work, conversations, skip_bad=skip_bad)
        job = spend_budgets(job, work, tokens)
        quantize(job, work, tokens, on_block, on_layer)
        learn(job, work)
    return job, tokens


def _finish(work_path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Remove the work directory: the checkpoint of `report` is complete."""
    clear_work(work_path)
    return report


@contextmanager
def _explain_memory_errors(job: Job) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MorphoQuantError(
            f"{job.source.directory}: the GPU has too little free memory for it with dtype {job.recipe.dtype}; "
            "pass --dtype bfloat16 or --device cpu, or use fewer or shorter samples"
        ) from error


def default_work(output: Path) -> Path:
    """The default work directory: beside the output, where a repeated call finds it."""
    return Path(f"{os.path.realpath(output)}.work")


def check_work(work_path: Path, output: Path, model: Path) -> None:
    """Raise MorphoQuantError if the work directory overlaps the output or the model."""
    here, place, source = (Path(os.path.realpath(path)) for path in (work_path, output, model))
    for name, other in (("--output", place), ("the model directory", source)):
        if here == other or here in other.parents or other in here.parents:
            raise MorphoQuantError(f"{work_path}: the work directory and {name} {other} overlap; choose another --work")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on `count` threads, those of the run's first start: another order of sums changes their last bits."""
    before = torch.get_num_threads()
    if count != before:
        logger.info("computing on %d threads, as the run that is resumed, instead of %d", count, before)
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)
