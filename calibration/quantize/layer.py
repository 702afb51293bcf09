"""From the observed activations of one input to the checkpoint's tensors. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.model.plan import matches
from calibration.processes import Processes
from calibration.quantize.bias import find_bias, find_means
from calibration.quantize.coded_tokens import CodedTokens, code_tokens, gather_moments, weigh_massive_alike
from calibration.quantize.grids import find_input
from calibration.quantize.held_out import tokens_of_held_samples
from calibration.quantize.layer_report import ErrorTokens, LayerFigures, input_figures, output_error
from calibration.quantize.massive_tokens import find_massive
from calibration.quantize.moments import Moments
from calibration.quantize.observation import Observation
from calibration.quantize.served_weights import ServedWeights, round_weights
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import LayerSpec, input_blocks
from morphoquant_vllm.format.schema import QuantizationSpec


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear's tensors, by the names of format.layers.tensor_specs, on the CPU, and its figures for the report."""

    tensors: dict[str, Tensor]
    figures: LayerFigures


@dataclass(frozen=True)
class DrawnInput:
    """This process's drawn tokens of one input, in the order of DrawnTokens."""

    # The input in the served stream, after the layers that are quantized already. It is quantized.
    observation: Observation
    # The input in the 16-bit stream, float32 [local drawn, K]. Its outputs are what the weights aim at.
    sixteen_bit: Tensor
    # Tokens with an outlying residual stream, bool [local drawn].
    outlying: Tensor


@dataclass(frozen=True)
class ReportedTokens:
    """The drawn tokens on which the report's figures are taken, if these are not all."""

    tokens: DrawnTokens
    # Their places among the drawn tokens of all processes, and among this one's: int64.
    places: Tensor
    local: Tensor

    def of(self, coded: CodedTokens, x16: Tensor, massive: Tensor) -> tuple[CodedTokens, Tensor, Tensor]:
        """Codes and 16-bit values [local reported, K] of these tokens, and which are massive, bool [reported]."""
        return coded.part(self.local), x16[self.local.to(x16.device)], massive[self.places]


def quantize_input(
    inputs: DrawnInput,
    tokens: DrawnTokens,
    shards: Mapping[str, Tensor],
    spec: QuantizationSpec,
    recipe: Recipe,
    reported: ReportedTokens | None = None,
    metrics: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizedLayer]:
    """Quantize the linears `shards` (weights [N, K] by layer name) that share one input.

    Computes on the device of the observed tokens. A modality gets a separate centre, gain and bias if that lowers its
    error, else those of `any`; the massive row always has separate ones.

    Each process has some of the tokens and fits some of the output channels; all get the same result. Sums of floats
    may differ between processes, so one process computes the results that depend on them and broadcasts them.
    `reported` are the tokens on which the figures of the report are taken; None means all. `metrics` are those of the
    outputs of some linears, by layer name (output_metric).
    """
    x, x16, processes = inputs.observation.drawn, inputs.sixteen_bit, tokens.processes
    first = spec.layers[next(iter(shards))]
    blocks = input_blocks(first, spec.tensor_parallel)
    matrix = torch.cat([weight.to(x.device, torch.float32) for weight in shards.values()])
    massive = find_massive(x, inputs.outlying, blocks, tokens, wanted=recipe.massive_row)
    found = find_input(
        inputs.observation, tokens, massive, matrix, spec, recipe, full_mask=full_mask(first, shards, recipe)
    )
    coded = code_tokens(x, tokens, massive.local, found, spec)
    # From here on in channel order.
    matrix = matrix[:, coded.order]
    # Beside routed experts nothing learns, so no sample has to judge.
    held_tokens = tokens_of_held_samples(tokens, recipe.effort) if reported is None and not spec.experts else None
    moments, held_moments = _moments(weigh_massive_alike(coded, processes), x16, matrix, tokens, held_tokens)
    step = found.grids.grid.step.to(x.device)[coded.order]
    known = _of_all(metrics or {}, shards, x.device)
    served = round_weights(matrix, step, moments, first, recipe, processes, known)
    del known
    if held_moments is not None:
        moments.add_means(held_moments)
    means = find_means(moments, coded, x, x16, massive.local, processes)
    any_massive = bool(massive.all.any())
    bias = processes.broadcast(lambda: find_bias(coded, means, matrix, served.matrix, blocks, any_massive=any_massive))
    layer_tensors = split_tensors(shards, served, bias[:, coded.sets.of_row])
    shown, shown_massive = tokens, massive.all
    if reported is not None:
        shown = reported.tokens
        coded, x16, shown_massive = reported.of(coded, x16, massive.all)
    figures = input_figures(coded, shown, shown_massive, found, spec.rows)
    errors = _output_errors(ErrorTokens.of(coded, x16, shown), shards, matrix, served.matrix, bias, processes)
    return {
        name: QuantizedLayer({**found.tensors, **layer_tensors[name]}, replace(figures, output_error=errors[name]))
        for name in shards
    }


def _of_all(metrics: Mapping[str, Tensor], shards: Collection[str], device: torch.device) -> list[Tensor]:
    """The metrics of the outputs of all `shards`, on the device; empty if one has none."""
    known = [metrics[name].to(device) for name in shards if name in metrics]
    return known if len(known) == len(shards) else []


def _moments(
    coded: CodedTokens, x16: Tensor, matrix: Tensor, tokens: DrawnTokens, held: Tensor | None
) -> tuple[Moments, Moments | None]:
    """Moments of the tokens that weights are fitted to, and the means of those that are `held` out, bool [drawn].

    The latter are None if none are held out.
    """
    if held is None:
        return gather_moments(coded, x16, matrix, tokens.processes), None
    local = tokens.local(held)
    places = local.nonzero().flatten()
    fitted = replace(coded, weight=coded.weight * ~local.to(coded.weight.device))
    of_held = gather_moments(coded.part(places), x16[places.to(x16.device)], matrix, tokens.processes)
    # Before the others are gathered: at the peak of memory there is one of these matrices.
    of_held.forget_squares()
    return gather_moments(fitted, x16, matrix, tokens.processes), of_held


def _output_errors(
    tokens: ErrorTokens,
    shards: Mapping[str, Tensor],
    matrix: Tensor,
    served: Tensor,
    bias: Tensor,
    processes: Processes,
) -> dict[str, float]:
    """Output error by layer; matrix and served are [N, K], bias [blocks, sets, N] of all `shards` together."""
    sizes = [weight.shape[0] for weight in shards.values()]
    parts = (matrix.split(sizes), served.split(sizes), bias.split(sizes, 2))
    return {
        name: output_error(tokens, full, dequantized, own_bias.sum(0), processes)
        for name, full, dequantized, own_bias in zip(shards, *parts, strict=True)
    }


def split_tensors(shards: Mapping[str, Tensor], served: ServedWeights, bias: Tensor) -> dict[str, dict[str, Tensor]]:
    """The checkpoint's tensors of each layer, on the CPU; bias [blocks, R, N] of all `shards` together."""
    sizes = [weight.shape[0] for weight in shards.values()]
    parts_of = {name: value.split(sizes) for name, value in served.stored.items()}
    parts_of["absorbed_bias"] = bias.split(sizes, 2)
    return {
        name: {tensor: parts[index].contiguous().cpu() for tensor, parts in parts_of.items()}
        for index, name in enumerate(shards)
    }


def full_mask(first: LayerSpec, shards: Iterable[str], recipe: Recipe) -> bool:
    """Whether every channel of the input of the layers `shards` may escape, in the reference's grid."""
    return matches(first.shared_input, recipe.full_mask) or any(matches(name, recipe.full_mask) for name in shards)
