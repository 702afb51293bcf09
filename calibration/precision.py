"""The stage of a calibration that spends `bits_budget`: which linears get 8-bit weights, or stay in 16 bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from calibration.blocks.sensitivity import Passes, choose_samples
from calibration.data.token_choice import TokenSample
from calibration.model.bits import FORMS, Candidate, apply, decoder_linears, in_form, mean_bits, spend, stored_bits
from calibration.model.loading import BlockLoader
from calibration.quantize.bit_losses import losses
from calibration.stages import Job
from calibration.work.directory import WorkDirectory
from calibration.work.forms import Choice, keep_choice, read_choice, read_front, sample_lengths
from morphoquant_vllm.format.layers import LayerSpec

logger = logging.getLogger(__name__)


def spend_bits(job: Job, work: WorkDirectory, tokens: TokenSample) -> Job:
    """The job with each linear in its form; unchanged without a `bits_budget`. The choice is kept, and resumed."""
    if job.recipe.bits_budget is None:
        return job
    choice = job.processes.broadcast(lambda: read_choice(work), [Choice])
    if choice is None:
        measured = measure_losses(job, work, tokens)
        choice = job.processes.broadcast(lambda: choose(job, measured), [Choice])
        made = choice
        job.processes.broadcast(lambda: keep_choice(work, made))
    if job.processes.first:
        logger.info("%s", _line(choice))
    return replace(job, spec=apply(job.spec, choice.forms))


def measure_losses(job: Job, work: WorkDirectory, tokens: TokenSample) -> dict[str, dict[int, float]]:
    """The losses of each input's forms, by the input's name, in the order of the blocks.

    The first process computes them, and the others wait block by block. They are empty on the others.
    """
    passes = _begin(job, work, tokens) if job.processes.first else None
    found: dict[str, dict[int, float]] = {}

    def forward(index: int) -> None:
        assert passes is not None
        passes.forward(index)

    def back(index: int) -> None:
        assert passes is not None
        if index == job.names.blocks - 1:
            passes.turn(job.recipe.modality_balance)
        for name, probe in passes.backward(index, _shards_of(job, index)).items():
            found[name] = losses(probe, job.recipe.group_size, job.recipe.escape_budget)
        if not index:
            passes.clear()

    for index in range(job.names.blocks):
        job.processes.broadcast(partial(forward, index))
    for index in reversed(range(job.names.blocks)):
        job.processes.broadcast(partial(back, index))
    order = job.spec.shared_inputs()
    return {name: found[name] for name in order if name in found}


def choose(job: Job, measured: Mapping[str, Mapping[int, float]]) -> Choice:
    """The forms that the budget allows, by the losses of each input's forms."""
    assert job.recipe.bits_budget is not None
    linears = decoder_linears(job.spec, job.names.prefix)
    weights = sum(_size(layer) for layer in linears.values())
    spare = (job.recipe.bits_budget - mean_bits(linears.values())) * weights
    shared = job.spec.shared_inputs()
    candidates = {}
    for name, loss in measured.items():
        layers = [job.spec.layers[layer] for layer in shared[name]]
        bits = {form: stored_bits(in_form(layers[0], form)) for form in FORMS}
        candidates[name] = Candidate(sum(map(_size, layers)), bits, loss)
    forms = spend(candidates, spare)
    added = sum(entry.weights * (entry.bits[forms[name]] - entry.bits[4]) for name, entry in candidates.items())
    total = sum(loss[4] for loss in measured.values())
    shares = {name: loss[4] / total if total > 0 else 0.0 for name, loss in measured.items()}
    return Choice(forms, mean_bits(linears.values()) + added / weights, shares)


def _begin(job: Job, work: WorkDirectory, tokens: TokenSample) -> Passes:
    # Modalities by the drawn tokens: every sample has some.
    parts = tokens.modality.split([positions.numel() for positions in tokens.positions])
    rows = [frozenset(part.unique().tolist()) for part in parts]
    chosen = choose_samples(sample_lengths(work), rows)
    logger.info("bits_budget: %d of %d samples choose the bits of weights", len(chosen), len(rows))
    blocks = BlockLoader(job.architecture, job.source, job.names, job.recipe, job.device)
    samples = [read_front(work, index) for index in chosen]
    return Passes(blocks, samples, work.path, job.recipe.seed)


def _shards_of(job: Job, block: int) -> dict[str, Sequence[str]]:
    """The names in the block of the linears of each quantized input, by the input's name in the files."""
    return {
        job.names.layer(block, shared.name): shared.shards
        for shared in job.architecture.shared_inputs
        if job.names.layer(block, shared.shards[0]) in job.spec.layers
    }


def _size(layer: LayerSpec) -> int:
    return layer.in_features * layer.out_features


def _line(choice: Choice) -> str:
    counts = {form: sum(found == form for found in choice.forms.values()) for form in FORMS}
    return (
        f"bits_budget: {counts[8]} inputs with 8-bit weights, {counts[16]} in 16 bit, {counts[4]} with 4-bit weights; "
        f"{choice.mean:.3f} bits a weight"
    )
