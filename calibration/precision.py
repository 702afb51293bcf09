"""The stage of a calibration before the blocks: it shares budgets among the inputs of the model, and finds metrics.

It first decides whether steps and scales will learn after the blocks. With a `bits_budget` it chooses the linears that
get 8-bit weights or stay in 16 bit. With `budget: model`, the default of a run that learns, it chooses the escape
budget of each input. A run that learns gets the metrics of outputs, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from calibration.blocks.sensitivity import BUDGET_TOKENS, Passes, choose_pass_samples, run_passes
from calibration.data.token_choice import DrawnTokens
from calibration.job import Job
from calibration.learn.extent import EXTENTS
from calibration.learn.metrics import METRIC_TOKENS, find_metrics
from calibration.learn.stage import will_learn
from calibration.model.bits import FORMS, Candidate, apply, decoder_linears, in_form, mean_bits, spend, stored_bits
from calibration.model.block_loader import BlockLoader
from calibration.quantize.bit_losses import losses
from calibration.quantize.escape_prices import EscapeCosts, escape_costs, share_budget
from calibration.quantize.held_out import tokens_of_held_samples
from calibration.settings.recipe import Recipe, rounds_jointly, shares_budget, shares_escapes
from calibration.work.budgets import Choice, keep_choice, read_choice, sample_lengths
from calibration.work.directory import WorkDirectory
from calibration.work.hidden_states import read_sample
from morphoquant_vllm.format.layers import LayerSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The probes' results by the input's name, in the order of the blocks; empty on all processes but the first."""

    # Losses of each form, if there is a `bits_budget`.
    losses: dict[str, dict[int, float]]
    # Costs of escapes, if the recipe has one budget for the model.
    escapes: dict[str, EscapeCosts]


def spend_budgets(job: Job, work: WorkDirectory, tokens: DrawnTokens) -> Job:
    """The job with all that is decided before the blocks: learning, forms, escape budgets, metrics.

    The choice is kept, and resumed. A run that has nothing to decide keeps none.
    """
    if job.recipe.effort not in EXTENTS and not shares_budget(job.recipe, learns=False):
        return _settled(job, learns=False)
    processes = job.processes
    choice = processes.broadcast(lambda: read_choice(work), [Choice])
    if choice is None:
        settled = _settled(job, learns=processes.broadcast(lambda: will_learn(job, sample_lengths(work))))
        made = choice = _make_choice(settled, work, tokens)
        processes.broadcast(lambda: keep_choice(work, made))
    return _with_choice(_settled(job, learns=choice.learns), choice)


def _settled(job: Job, *, learns: bool) -> Job:
    """The job that learns or not, with "auto" for a recipe's `budget` replaced by what that means."""
    budget = "model" if shares_escapes(job.recipe, learns=learns) else "equal"
    return replace(job, learns=learns, recipe=_with_budget(job.recipe, budget))


def _with_budget(recipe: Recipe, budget: str) -> Recipe:
    return recipe.model_copy(update={"budget": budget})


def _make_choice(job: Job, work: WorkDirectory, tokens: DrawnTokens) -> Choice:
    """Measure what the recipe needs, and choose; the metrics are kept."""
    shares, jointly = (wanted(job.recipe, learns=job.learns) for wanted in (shares_budget, rounds_jointly))
    measured = measure(job, work, tokens) if shares else Measured({}, {})
    choice = job.processes.broadcast(lambda: choose(job, measured), [Choice])
    if not jointly:
        return choice
    formed = replace(job, spec=apply(job.spec, choice.forms))
    begin = partial(_begin, "metrics of outputs", job, work, tokens, METRIC_TOKENS, judges=False)
    files = find_metrics(formed, work, begin)
    return replace(choice, metrics={name: asdict(record) for name, record in files.items()})


def _with_choice(job: Job, choice: Choice) -> Job:
    """The job with a choice, which the log tells."""
    if job.processes.first:
        for line in _lines(job, choice):
            logger.info("%s", line)
    spent = replace(
        job, spec=apply(job.spec, choice.forms), escape_budgets=choice.escape_budgets, metrics=choice.metrics
    )
    return spent if choice.escape_budgets else replace(spent, recipe=_with_budget(job.recipe, "equal"))


def measure(job: Job, work: WorkDirectory, tokens: DrawnTokens) -> Measured:
    """What forms and escapes of each input cost. The first process measures it, the others wait block by block."""
    losses_of: dict[str, dict[int, float]] = {}
    escapes_of: dict[str, EscapeCosts] = {}

    def turn(passes: Passes) -> None:
        passes.start_back_from_projection(job.recipe.modality_balance)

    def back(passes: Passes, index: int) -> None:
        for name, probe in passes.backward(index, _shards_of(job, index)).items():
            if job.recipe.bits_budget is not None:
                losses_of[name] = losses(probe, job.recipe.group_size, job.recipe.escape_budget)
            if job.recipe.budget == "model" and probe.x.shape[0]:
                escapes_of[name] = escape_costs(probe)

    begin = partial(_begin, "budgets", job, work, tokens, BUDGET_TOKENS)
    run_passes(begin, job.names.blocks, job.processes, turn=turn, back=back)
    order = job.spec.shared_inputs()
    return Measured(
        {name: losses_of[name] for name in order if name in losses_of},
        {name: escapes_of[name] for name in order if name in escapes_of},
    )


def choose(job: Job, measured: Measured) -> Choice:
    """The forms and escape budgets that the recipe's budgets allow."""
    shared = job.spec.shared_inputs()
    candidates = {}
    for name, loss in measured.losses.items():
        layers = [job.spec.layers[layer] for layer in shared[name]]
        bits = {form: stored_bits(in_form(layers[0], form)) for form in FORMS}
        candidates[name] = Candidate(sum(map(_size, layers)), bits, loss)
    linears = decoder_linears(job.spec, job.names.prefix)
    weights, least = sum(_size(layer) for layer in linears.values()), mean_bits(linears.values())
    budget = least if job.recipe.bits_budget is None else job.recipe.bits_budget
    forms = spend(candidates, (budget - least) * weights)
    added = sum(entry.weights * (entry.bits[forms[name]] - entry.bits[4]) for name, entry in candidates.items())
    total = sum(loss[4] for loss in measured.losses.values())
    shares = {name: loss[4] / total if total > 0 else 0.0 for name, loss in measured.losses.items()}
    escapes = share_budget(measured.escapes, job.recipe.escape_budget)
    if job.recipe.budget == "model" and not escapes:
        logger.warning("budget: the derivatives compare nothing, so every input has the same budget of escapes")
    return Choice(forms, least + added / weights, shares, escapes, learns=job.learns)


def _begin(
    purpose: str, job: Job, work: WorkDirectory, tokens: DrawnTokens, most: int, *, judges: bool = True
) -> Passes:
    """Passes of about `most` tokens; without `judges`, of samples that may shape the weights."""
    # Modalities by the drawn tokens: every sample has some.
    parts = tokens.modality.split([positions.numel() for positions in tokens.positions])
    rows = [frozenset(part.unique().tolist()) for part in parts]
    held = None if judges else tokens_of_held_samples(tokens, job.recipe.effort)
    allowed = list(range(len(rows)))
    if held is not None:
        shares = held.split([part.numel() for part in parts])
        allowed = [index for index in allowed if not bool(shares[index].all())]
    lengths = sample_lengths(work)
    places = choose_pass_samples(
        [lengths[index] for index in allowed],
        [rows[index] for index in allowed],
        min(most, job.recipe.sample_tokens),
    )
    chosen = [allowed[place] for place in places]
    logger.info("%s: %d of %d samples pass forward and back", purpose, len(chosen), len(rows))
    blocks = BlockLoader(job.architecture, job.source, job.names, job.recipe, job.device)
    samples = [read_sample(work.path, index, work.device) for index in chosen]
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


def _lines(job: Job, choice: Choice) -> list[str]:
    lines = []
    if job.recipe.bits_budget is not None:
        counts = {form: sum(found == form for found in choice.forms.values()) for form in FORMS}
        lines.append(
            f"bits_budget: {counts[8]} inputs with 8-bit weights, {counts[16]} in 16 bit, {counts[4]} with 4-bit "
            f"weights; {choice.mean:.3f} bits a weight"
        )
    if choice.escape_budgets:
        least, most = (pick(choice.escape_budgets, key=choice.escape_budgets.__getitem__) for pick in (min, max))
        lines.append(
            f"budget: escape budgets from {choice.escape_budgets[least]:.2%} ({least}) to "
            f"{choice.escape_budgets[most]:.2%} ({most})"
        )
    return lines
