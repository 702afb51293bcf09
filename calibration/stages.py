"""Three stages of a calibration: capture, quantize, export. Each resumes from the content of the work directory.

The five stages in their order:

    capture                    the inputs of the first block
    precision.spend_budgets    whether the checkpoint learns, and budgets that the inputs share
    quantize                   block by block
    learn.stage.learn          steps, scales and constants, from the model's output
    export                     the checkpoint and its report
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.blocks.capture import MemoryInput, capture_block_inputs, serve_towers
from calibration.blocks.loop import calibrate_blocks
from calibration.blocks.memory_need import BASE
from calibration.blocks.results import BlockResult, LayerBegins
from calibration.blocks.towers import calibrate_towers, check_media
from calibration.data.conversations import Conversation, PlainText
from calibration.data.rendering import Keep, Sample, build_samples
from calibration.data.token_choice import DrawnTokens
from calibration.forecast import forecast
from calibration.job import Job
from calibration.learn.changes import changes_of
from calibration.model.block_loader import BlockLoader
from calibration.model.discovery import GENERIC
from calibration.model.loading import load_front
from calibration.model.plan import sixteen_bit
from calibration.model.source import Source
from calibration.output.card import model_card, read_front_matter
from calibration.output.export import checkpoint_size, tensors_size, write_checkpoint
from calibration.output.places import check_free_space
from calibration.output.report import empty_experts, make_report
from calibration.output.staging import explain_write_errors, staged_directory
from calibration.work.budgets import read_metrics, report_entry
from calibration.work.directory import WorkDirectory
from calibration.work.learned import read_changes, read_figures
from calibration.work.rendered import drop_rendered, store_media, stored_bytes
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import verify_checkpoint

logger = logging.getLogger(__name__)


def capture(
    job: Job, work: WorkDirectory, data: Sequence[Conversation | PlainText], *, skip_bad: bool = False
) -> DrawnTokens:
    """Render the data, run embeddings and towers on them, and keep the decoder's inputs; the drawn tokens."""
    if work.finished is not None:
        job.processes.broadcast(lambda: drop_rendered(work.path))
        return job.choose_tokens(work.modalities())
    source, recipe = job.source, job.recipe
    # This check needs no data, and rendering can take long.
    job.memory_need()
    samples, tokens = prepare(job, data, partial(store_media, work.path), skip_bad=skip_bad)
    need = job.memory_need(tokens)
    rendered = stored_bytes(work.path)
    expected = forecast(job, tokens, rendered)
    check_free_space(work.path, expected.work - rendered, "the work directory", "--work")
    if job.processes.first:
        for line in expected.lines():
            logger.info("%s", line)
    stream = need.front > job.device_limit and not recipe.towers
    model = load_front(job.architecture, source, recipe, stream_towers=stream, device=job.device)
    sources = {index: sample.source for index, sample in zip(tokens.samples, samples, strict=True)}
    work.keep_samples(sources, _run_front(job, work, model, samples, tokens))
    job.processes.broadcast(lambda: drop_rendered(work.path))
    return tokens


def prepare(
    job: Job, data: Sequence[Conversation | PlainText], keep: Keep, *, skip_bad: bool = False
) -> tuple[list[Sample], DrawnTokens]:
    """This process's samples, whose inputs `keep` puts away, and the drawn tokens."""
    recipe = job.recipe
    samples = build_samples(
        job.source.directory,
        data,
        max_tokens=recipe.max_tokens,
        max_samples=recipe.max_samples,
        window_tokens=recipe.window_tokens,
        placeholder_token_ids=job.spec.placeholder_token_ids,
        rows=job.spec.rows,
        skip_bad=skip_bad,
        trust_remote_code=recipe.trust_remote_code,
        keep=keep,
        processes=job.processes,
    )
    check_media(samples, recipe, job.processes)
    return samples, job.choose_tokens({sample.place: sample.modality for sample in samples})


def _run_front(
    job: Job, work: WorkDirectory, model: Any, samples: Sequence[Sample], tokens: DrawnTokens
) -> Iterable[MemoryInput]:
    """The decoder's inputs of each sample, from embeddings and towers; quantizes and keeps towers if requested."""
    blocks = list(model.get_submodule(job.architecture.block_module).children())
    positions = [tokens.positions[index] for index in tokens.samples]
    if not job.recipe.towers:
        tuples = job.architecture.tuple_output
        return capture_block_inputs(model, blocks, samples, positions, tuple_output=tuples)
    captured = list(capture_block_inputs(model, blocks, samples, positions))
    work.keep_towers(
        calibrate_towers(
            model,
            samples,
            architecture=job.architecture,
            source=job.source,
            spec=job.spec,
            recipe=job.recipe,
            processes=job.processes,
        )
    )
    # The served stream begins with the outputs of the quantized towers, the 16-bit stream with those of the 16-bit
    # towers.
    for entry, again in zip(captured, capture_block_inputs(model, blocks, samples, positions), strict=True):
        serve_towers(entry, again)
    return captured


def quantize(
    job: Job,
    work: WorkDirectory,
    tokens: DrawnTokens,
    on_block: Callable[[BlockResult], None] | None = None,
    on_layer: Callable[[LayerBegins], None] | None = None,
) -> None:
    """Quantize the unfinished blocks in order, and keep each block as soon as it is finished."""
    assert work.finished is not None
    if work.finished == job.names.blocks:
        return
    need = job.memory_need(tokens)
    beside = need.block if job.device.type == "cpu" else BASE
    inputs = work.inputs(in_memory=beside + work.states_size() <= job.memory_limit)
    for result in calibrate_blocks(
        BlockLoader(job.architecture, job.source, job.names, job.recipe, job.device),
        inputs,
        tokens,
        architecture=job.architecture,
        names=job.names,
        source=job.source,
        spec=job.spec,
        recipe=job.recipe,
        escape_budgets=job.escape_budgets,
        first=work.finished,
        on_layer=on_layer,
        metrics_of=partial(read_metrics, work, job.metrics),
    ):
        work.finish_block(result, inputs)
        if on_block is not None:
            on_block(result)


def _structure(job: Job) -> dict[str, Any]:
    """What the report says of an unlisted architecture, of code that ran, and of linears that stay in 16 bit."""
    kept = sixteen_bit(job.architecture, job.names, job.source.tensors)
    said: dict[str, Any] = {} if job.architecture.verified else {"architecture": GENERIC}
    if job.architecture.remote_code:
        said["remote_code"] = job.architecture.remote_code
    return said | ({"sixteen_bit": sorted(kept)} if kept else {})


def export(job: Job, work: WorkDirectory, tokens: DrawnTokens, output: Path, *, overwrite: bool) -> dict[str, Any]:
    """Write the checkpoint from the finished blocks and move it to `output`; its report."""
    source, recipe = job.source, job.recipe
    ranges = {job.names.block(block): found for block, found in work.attention().items()}
    spec = replace(job.spec, kv_cache=ranges)
    experts = work.experts()
    report = make_report(recipe, spec, work.figures(), len(tokens.positions), tokens.counts, experts) | _structure(job)
    warning = empty_experts(experts)
    if warning:
        logger.warning("%s", warning)
    if job.escape_budgets:
        report["escape_budgets"] = dict(job.escape_budgets)
    figures = read_figures(work)
    changes = None if figures is None else changes_of(read_changes(work))
    if figures is not None:
        report["learning"] = figures
    if recipe.bits_budget is not None:
        report["bits"] = report_entry(work, recipe.bits_budget)
    if source.fp8:
        report["source"] = {"weights": f"{source.fp8}, read as bfloat16"}
    block_of = {job.names.layer(block, ""): block for block in range(job.names.blocks)}

    def load(layer: str, tensor: str) -> Tensor:
        # A layer outside the decoder's blocks belongs to a tower.
        block = next((block for start, block in block_of.items() if layer.startswith(start)), None)
        value = work.tensor(block, layer, tensor)
        return value if changes is None else changes.applied(layer, spec.layers[layer], tensor, value)

    # The scratch directory is named by the work directory, so a resumed run uses the same one.
    tag = hashlib.sha256(str(work.path.resolve()).encode()).hexdigest()[:8]
    with staged_directory(output, source.directory, overwrite=overwrite, tag=tag) as directory:
        check_free_space(directory, checkpoint_size(source, spec))
        with explain_write_errors(output, source.directory):
            card = checkpoint_card(source, spec, report)
            write_checkpoint(directory, source, spec, load, recipe.shard_size, report, work.distributions(), card)
        # The hashes were just computed from these files; reading them again would only repeat that.
        verify_checkpoint(directory, checksums=False)
        work.note_export(directory)
    return report


def checkpoint_card(source: Source, spec: QuantizationSpec, report: Mapping[str, Any]) -> str:
    """The text of the checkpoint's README.md."""
    named = source.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else source.config.get("model_type", "unknown")
    sizes = tensors_size(source, spec), sum(info.nbytes for info in source.tensors.values())
    return model_card(read_front_matter(source.directory), spec, report, architecture, *sizes)
