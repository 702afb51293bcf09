"""From the observed input of routed experts to the checkpoint's tensors. Pure: tensors in, tensors out.

Gate and up of all experts read one input: its grid, rows and codes are found once, on all drawn tokens. Each expert's
weights are then fitted to the tokens that chose it, and to all others with the weight of a few. Experts are processed
one at a time, so their 16-bit weights and moments are in memory for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from calibration.data.token_choice import DrawnTokens
from calibration.quantize.bias import Means, find_bias, find_means, means_in_any_row
from calibration.quantize.chunks import zip_chunks
from calibration.quantize.coded_tokens import CodedTokens, code_tokens, gather_moments, weigh_massive_alike
from calibration.quantize.grids import FoundInput, find_input
from calibration.quantize.layer import (
    DrawnInput,
    ReportedTokens,
    full_mask,
    quantize_input,
    split_tensors,
)
from calibration.quantize.layer_report import ErrorTokens, ExpertsFigures, LayerFigures, input_figures, output_error
from calibration.quantize.massive_tokens import MassiveTokens, find_massive
from calibration.quantize.moments import Moments
from calibration.quantize.observation import InputCollector, Routing
from calibration.quantize.served_weights import round_weights
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import input_holder
from morphoquant_vllm.format.schema import QuantizationSpec

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# All drawn tokens together weigh as many tokens as this in each expert's moments.
POOLED_TOKENS = 64
# An expert with fewer drawn tokens has few: the grid of its down takes as many others.
FEW_TOKENS = 256
# Damping of the factor of the experts' weights, as a fraction of their mean energy.
FACTOR_DAMPING = 1e-6

# Weights of one expert by the last part of their names: gate and up [intermediate, K], down [K, intermediate].
LoadExpert = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class DrawnExperts:
    """The drawn tokens of the experts' input, and the routing of all tokens, both in the served stream."""

    input: DrawnInput
    routing: Routing


@dataclass(frozen=True)
class QuantizedExperts:
    """Tensors of each linear by its name in the checkpoint, on the CPU, and the figures for the report.

    The tensors of the one input of gate and up are those of the first expert's gate.
    """

    tensors: dict[str, dict[str, Tensor]]
    figures: ExpertsFigures


@dataclass(frozen=True)
class _QuantizedExpert:
    """The tensors of one expert's linears, by their names in the checkpoint."""

    tensors: dict[str, dict[str, Tensor]]
    # Output error of gate and up, and the figures of down; None if no drawn token chose the expert.
    figures: tuple[float, LayerFigures] | None


@dataclass(frozen=True)
class _Layer:
    """The common part of the experts of one layer; tokens are this process's, if nothing else is said."""

    name: str
    spec: QuantizationSpec
    recipe: Recipe
    tokens: DrawnTokens
    drawn: DrawnExperts
    massive: MassiveTokens
    found: FoundInput
    coded: CodedTokens
    # The same with the weights of the fits.
    fitted: CodedTokens
    # Of all drawn tokens: moments with codes times values, and means.
    pooled: Moments
    means: Means
    # dtype in which the model runs.
    dtype: torch.dtype


@dataclass(frozen=True)
class _Chosen:
    """The drawn tokens of one expert."""

    # Places among all drawn tokens, int64, ascending: tokens that chose it, and these with the borrowed ones.
    routed: Tensor
    served: Tensor
    # The share of the tokens that chose it in its moments.
    share: float
    # Both as samples; borrowed tokens weigh 1 - share in the second.
    reported: ReportedTokens
    tokens: DrawnTokens


def quantize_experts(
    drawn: DrawnExperts,
    tokens: DrawnTokens,
    name: str,
    load: LoadExpert,
    spec: QuantizationSpec,
    recipe: Recipe,
) -> QuantizedExperts:
    """Quantize the list of experts `name` of the spec; computes on the device of the observed tokens.

    `load` gives the weights of one expert, and is called twice for each. All processes get the same result.
    """
    layer = _find_layer(drawn, tokens, name, load, spec, recipe)
    experts = [_quantize_expert(layer, expert, load(expert)) for expert in range(spec.experts[name].count)]
    tensors = {linear: stored for expert in experts for linear, stored in expert.tensors.items()}
    tensors[input_holder(name)] |= layer.found.tensors
    return QuantizedExperts(tensors, _figures(layer, experts))


def _quantize_expert(layer: _Layer, expert: int, weights: Mapping[str, Tensor]) -> _QuantizedExpert:
    """Gate and up of one expert, then down, on the outputs of the served gate and up."""
    chosen = _choose(layer, expert)
    seen = bool(chosen.routed.numel())
    recipe = layer.recipe if seen else _plain(layer.recipe)
    linears = {kind: f"{layer.name}.{expert}.{kind}" for kind in (GATE, UP, DOWN)}
    tensors, error, inner = _quantize_gate_up(layer, chosen, linears, weights, recipe)
    shards = {linears[DOWN]: weights[DOWN]}
    down = quantize_input(inner, chosen.tokens, shards, layer.spec, recipe, chosen.reported)[linears[DOWN]]
    return _QuantizedExpert({**tensors, linears[DOWN]: down.tensors}, (error, down.figures) if seen else None)


def _find_layer(
    drawn: DrawnExperts,
    tokens: DrawnTokens,
    name: str,
    load: LoadExpert,
    spec: QuantizationSpec,
    recipe: Recipe,
) -> _Layer:
    """Grid, rows and codes of the one input of gate and up, and its pooled moments."""
    x, x16, processes = drawn.input.observation.drawn, drawn.input.sixteen_bit, tokens.processes
    settings = spec.experts[name].layers(name)
    first = settings[input_holder(name)]
    # In place of the weights of all experts: a matrix that gives every error and column norm the same size.
    factor = gram_factor(_gram(load, spec.experts[name].count, tokens, x.device, x.shape[1]))
    massive = find_massive(x, drawn.input.outlying, 1, tokens, wanted=recipe.massive_row)
    found = find_input(
        drawn.input.observation,
        tokens,
        massive,
        factor,
        spec,
        recipe,
        full_mask=full_mask(first, [input_holder(name)], recipe),
    )
    coded = code_tokens(x, tokens, massive.local, found, spec)
    fitted = weigh_massive_alike(coded, processes)
    pooled = gather_moments(fitted, x16, factor[:, coded.order], processes)
    means = find_means(pooled, coded, x, x16, massive.local, processes)
    of_experts = replace(spec, layers=settings, experts={})
    dtype = getattr(torch, recipe.dtype)
    return _Layer(name, of_experts, recipe, tokens, drawn, massive, found, coded, fitted, pooled, means, dtype)


def _gram(load: LoadExpert, count: int, tokens: DrawnTokens, device: torch.device, width: int) -> Tensor:
    """Sum over experts of W^T W of gate and up, float32 [K, K]; each process adds some experts."""
    gram = torch.zeros(width, width, device=device)
    share = tokens.processes.share(count)
    for expert in range(share.start, share.stop):
        weights = load(expert)
        for kind in (GATE, UP):
            weight = weights[kind].to(device, torch.float32)
            gram.addmm_(weight.T, weight)
    return tokens.processes.all_reduce(gram, "SUM")


def gram_factor(gram: Tensor) -> Tensor:
    """Upper triangular U [K, K] with U^T U = gram [K, K], almost: outputs x U^T have the norms of those of W.

    gram = W^T W, so the columns of U have the norms of W's.
    """
    damping = FACTOR_DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = gram.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not int(failed):
            return factor
        damping *= 10


def _choose(layer: _Layer, expert: int) -> _Chosen:
    """The drawn tokens of an expert, and evenly spaced ones that it borrows from the others."""
    tokens, routing = layer.tokens, layer.drawn.routing
    chose = routing.chosen[:, expert]
    routed, others = chose.nonzero().flatten(), (~chose).nonzero().flatten()
    wanted = min(others.numel(), max(POOLED_TOKENS, FEW_TOKENS - routed.numel()))
    borrowed = others[torch.linspace(0, max(0, others.numel() - 1), wanted).long()]
    share = routed.numel() / (routed.numel() + POOLED_TOKENS) if wanted else 1.0
    weight = torch.zeros_like(tokens.weight)
    for places, part in ((routed, share), (borrowed, 1 - share)):
        if places.numel():
            weight[places] = part * tokens.weight[places] / tokens.weight[places].sum()
    served = torch.cat((routed, borrowed)).sort().values
    present = tokens.modality[served].unique().tolist()
    counts = {row: max(1, int(routing.counts[row, expert])) for row in present}
    of_routed = {row: counts[row] for row in tokens.modality[routed].unique().tolist()}
    reported = tokens.part(routed, tokens.weight[routed], of_routed)
    within = (torch.isin(served, routed)).nonzero().flatten()
    all_served = tokens.part(served, weight[served], counts)
    return _Chosen(routed, served, share, ReportedTokens(reported, within, all_served.local_places(within)), all_served)


def _plain(recipe: Recipe) -> Recipe:
    """The recipe of an expert that no drawn token chose: each weight is rounded by itself."""
    return recipe.model_copy(update={"rounding": "nearest", "regression": False})


def _quantize_gate_up(
    layer: _Layer, chosen: _Chosen, linears: Mapping[str, str], weights: Mapping[str, Tensor], recipe: Recipe
) -> tuple[dict[str, dict[str, Tensor]], float, DrawnInput]:
    """Tensors of gate and up, their output error, and the input of down on the expert's tokens."""
    coded, processes = layer.coded, layer.tokens.processes
    shards = {linears[kind]: weights[kind] for kind in (GATE, UP)}
    matrix = torch.cat([weight.to(coded.codes.device, torch.float32) for weight in shards.values()])[:, coded.order]
    routed = layer.tokens.local_places(chosen.routed).to(coded.codes.device)
    x16 = layer.drawn.input.sixteen_bit
    part, part_x16 = coded.part(routed), x16[routed]
    moments = gather_moments(layer.fitted.part(routed), part_x16, matrix, processes)
    moments.mix(layer.pooled, chosen.share)
    means = _means(layer, chosen, routed, moments)
    step = layer.found.grids.grid.step.to(matrix.device)[coded.order]
    served = round_weights(matrix, step, moments, layer.spec.layers[linears[GATE]], recipe, processes)
    any_massive = bool(layer.massive.all.any())
    bias = processes.broadcast(lambda: find_bias(coded, means, matrix, served.matrix, 1, any_massive=any_massive))
    error_tokens = ErrorTokens.of(part, part_x16, chosen.reported.tokens)
    error = output_error(error_tokens, matrix, served.matrix, bias.sum(0), processes)
    inner = _inner_input(layer, chosen, matrix, served.matrix, bias.sum(0), linears[DOWN])
    return split_tensors(shards, served, bias[:, coded.sets.of_row]), error, inner


def _means(layer: _Layer, chosen: _Chosen, routed: Tensor, moments: Moments) -> Means:
    """Means of each set of tokens, as bias.find_means; the expert's tokens have the share of its moments."""
    code, value = moments.means()
    if not layer.coded.sets.any_modality_only:
        code[0], value[0] = layer.means.code[0], layer.means.value[0]
        ordinary = routed[~layer.massive.local.to(routed.device)[routed]]
        if chosen.routed.numel() and not bool(layer.massive.all[chosen.routed].all()):
            x, x16 = layer.drawn.input.observation.drawn, layer.drawn.input.sixteen_bit
            routed_means = means_in_any_row(layer.coded, x, x16, ordinary, layer.tokens.processes)
            code[0], value[0] = (
                chosen.share * mine + (1 - chosen.share) * pooled
                for mine, pooled in zip(routed_means, (code[0], value[0]), strict=True)
            )
    return Means(code, value)


def _inner_input(layer: _Layer, chosen: _Chosen, matrix: Tensor, served: Tensor, bias: Tensor, name: str) -> DrawnInput:
    """The input of down on the expert's tokens, borrowed ones included.

    matrix and served [2 intermediate, K] are the 16-bit and the served weights of gate and up.
    bias [sets, 2 intermediate] are those of sets.
    """
    local = layer.tokens.local_places(chosen.served).to(matrix.device)
    coded, outlying = layer.coded.part(local), layer.drawn.input.outlying[local.cpu()]
    x16 = layer.drawn.input.sixteen_bit[local]
    wanted, found = [matrix.new_zeros(0, matrix.shape[0] // 2)], [matrix.new_zeros(0, matrix.shape[0] // 2)]
    for codes, gain, sets, values in zip_chunks(coded.codes, coded.gain, coded.token_set, x16):
        gated = (codes.float() * gain[:, None]) @ served.T + bias[sets]
        found.append(_gated(gated, layer.dtype))
        wanted.append(_gated(values.index_select(1, coded.order) @ matrix.T, layer.dtype))
    x = torch.cat(found)
    collector = InputCollector(name)
    modality = chosen.tokens.local(chosen.tokens.modality)
    rows = torch.where(outlying, len(layer.spec.rows) - 1, modality).to(x.device)
    collector.add(x, rows, torch.arange(x.shape[0], device=x.device))
    return DrawnInput(collector.observation(layer.tokens.processes), torch.cat(wanted), outlying)


def _gated(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up in float32 [tokens, intermediate], each rounded to `dtype` as in numerics.experts.

    gate_up is [tokens, 2 intermediate].
    """
    gate, up = gate_up.to(dtype).chunk(2, dim=1)
    return (silu(gate) * up).float()


def _figures(layer: _Layer, experts: Sequence[_QuantizedExpert]) -> ExpertsFigures:
    drawn = layer.drawn.routing.chosen.sum(0).tolist()
    of_input = input_figures(layer.coded, layer.tokens, layer.massive.all, layer.found, layer.spec.rows)
    figures = [expert.figures for expert in experts]
    known = [found[0] for found in figures if found is not None]
    return ExpertsFigures(
        tokens=layer.drawn.routing.counts.sum(0).tolist(),
        drawn_tokens=drawn,
        few=sum(0 < count < FEW_TOKENS for count in drawn),
        none=sum(count == 0 for count in drawn),
        input=replace(of_input, output_error=sum(known) / len(known) if known else 0.0),
        gate_up_error=[None if found is None else found[0] for found in figures],
        down_error=[None if found is None else found[1].output_error for found in figures],
        down_escape_rate=[None if found is None else found[1].escape_rate["all"] for found in figures],
    )
