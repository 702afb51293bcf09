"""From what calibration saw of one input to the checkpoint's tensors. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from calibration import massive as massive_tokens
from calibration import moments as second_moments
from calibration import steps
from calibration.collect import Observation
from calibration.plan import matches
from calibration.recipe import Recipe
from calibration.reference_grid import reference_grid
from calibration.rounding import quantize_compensated
from calibration.sampling import TokenSample
from morphoquant_vllm.numerics import activation, weights
from morphoquant_vllm.numerics.statistics import ChannelStatistics
from morphoquant_vllm.schema import INPUT_TENSORS, LayerSpec, QuantizationSpec, input_blocks

# Elements of a chunk of tokens: on a CPU few enough to stay near the cache, and enough that waiting for each other at
# the end of every operation costs the threads little on a busy machine; on a GPU enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
# The step is searched on about this many tokens, and the output error measured on as many.
SEARCH_TOKENS = 2048
# A channel whose codes were all 0 in calibration still counts this part of the mean, so that its weights stay sane.
IMPORTANCE_FLOOR = 1e-4
# Sets of tokens that have a bias of their own.
ORDINARY, MASSIVE = 0, 1


@dataclass(frozen=True)
class LayerRecord:
    """What the report says about one quantized linear."""

    # Codes outside [-8, 7] as a fraction of all codes, by row name; "all": of the tokens as they occur in the data.
    escape_rate: dict[str, float]
    # Root of the weighted mean square error of the output, relative to the 16-bit layer's on 16-bit inputs (no bias).
    output_error: float
    # Channels that may escape, by row name.
    masked_channels: dict[str, int]
    # How many channels the guard gave a larger step than the search chose, and the largest factor.
    guard_raised_channels: int
    guard_largest_raise: float
    # Sampled tokens that the massive row serves.
    massive_tokens: int


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear's tensors, by the names of schema.tensor_specs, on the CPU, and its record."""

    tensors: dict[str, Tensor]
    record: LayerRecord


@dataclass(frozen=True)
class InputSample:
    """The sampled tokens of one input, in the order of TokenSample."""

    # As the quantized layers before give it: what is quantized.
    observation: Observation
    # As the 16-bit model has it, float32 [T, K]: whose outputs are aimed at.
    target: Tensor
    # Tokens with an outlying residual stream, bool [T].
    outlying: Tensor


def quantize_input(
    inputs: InputSample,
    tokens: TokenSample,
    shards: Mapping[str, Tensor],
    spec: QuantizationSpec,
    recipe: Recipe,
) -> dict[str, QuantizedLayer]:
    """Quantize the linears `shards` (weights [N, K] by layer name) that share one input.

    Computes on the device of the sample. Every modality's row is the same; the massive row has a centre, a gain and a
    bias of its own.
    """
    x = inputs.observation.sample
    device = x.device
    first = spec.layers[next(iter(shards))]
    blocks = input_blocks(first, spec.tensor_parallel)
    matrix = torch.cat([weight.to(device, torch.float32) for weight in shards.values()])
    weight = tokens.weight.to(device)
    intervals = (
        massive_tokens.find_intervals(x, inputs.outlying.to(device), blocks)
        if recipe.massive_row
        else massive_tokens.no_intervals(x.shape[1], blocks)
    )
    token_set = massive_tokens.holds(x, intervals).long()
    massive_row = len(spec.rows) - 1
    full_mask = _full_mask(first, shards, recipe)
    mask, grid = _grid(inputs.observation, massive_row, token_set, weight, matrix, recipe, full_mask)
    order = weights.channel_order(weights.absorb(matrix, grid.step).cpu(), blocks)
    natural = _input_tensors(x, token_set, mask, grid, order, intervals, len(spec.rows))
    record = activation.activation_record(*(natural[name].to(device) for name in INPUT_TENSORS))
    rows = torch.where(token_set == MASSIVE, massive_row, spec.any_row).int()
    codes = torch.cat([activation.act_quant(part, row, record) for part, row in _together(x, rows)])
    gathered = order.long().to(device)
    target = inputs.target.index_select(1, gathered)
    gain = record.gain[rows.long()][:, None]
    moments = second_moments.gather(
        (
            (part.float() * part_gain, values - record.centre[row.long()], which, token_weight)
            for part, part_gain, values, row, which, token_weight in _together(
                codes, gain, target, rows, token_set, weight
            )
        ),
        sets=2,
        in_features=x.shape[1],
        device=device,
    )
    matrix = matrix[:, gathered]
    int4, scale = _round_weights(matrix, grid.step[gathered.to(grid.step.device)].to(device), moments, first, recipe)
    packed = weights.pack(int4)
    served = weights.dequantize_weight(packed, scale)
    centre = torch.stack((record.centre[spec.any_row], record.centre[-1]))
    bias = weights.absorbed_bias(matrix, centre, blocks) + second_moments.output_bias(moments, matrix, served, blocks)
    if not bool((token_set == MASSIVE).any()):
        bias[:, MASSIVE] = bias[:, ORDINARY]
    row_sets = torch.tensor([ORDINARY] * massive_row + [MASSIVE], device=device)
    common = LayerRecord(
        escape_rate=_escape_rates(codes, tokens, token_set, spec.rows),
        output_error=0.0,
        masked_channels=dict(zip(spec.rows, natural["modality_mask"].sum(1).tolist(), strict=True)),
        guard_raised_channels=int((grid.guard_raise > 1).sum()),
        guard_largest_raise=float(grid.guard_raise.max()),
        massive_tokens=int((token_set == MASSIVE).sum()),
    )
    quantized = {}
    sizes = [value.shape[0] for value in shards.values()]
    for name, *parts in zip(
        shards, packed.split(sizes), scale.split(sizes), served.split(sizes), matrix.split(sizes), bias.split(sizes, 2),
        strict=True,
    ):  # fmt: skip
        codes4, scales, dequantized, full, own_bias = parts
        error = _output_error(codes.float() * gain, target, token_set, weight, full, dequantized, own_bias.sum(0))
        quantized[name] = QuantizedLayer(
            tensors={
                **natural,
                "weight_codes": codes4.contiguous().cpu(),
                "weight_scale": scales.contiguous().cpu(),
                "absorbed_bias": own_bias[:, row_sets].contiguous().cpu(),
            },
            record=replace(common, output_error=error),
        )
    return quantized


def _full_mask(first: LayerSpec, shards: Mapping[str, Tensor], recipe: Recipe) -> bool:
    return matches(first.shared_input, recipe.full_mask) or any(matches(name, recipe.full_mask) for name in shards)


def _grid(
    observation: Observation,
    massive_row: int,
    token_set: Tensor,
    weight: Tensor,
    matrix: Tensor,
    recipe: Recipe,
    full_mask: bool,
) -> tuple[Tensor, activation.Grid]:
    """Mask bool [K] and grid of one input's ordinary tokens, on the device of the sample."""
    ordinary = (token_set == ORDINARY).nonzero().flatten()
    sample, weight = observation.sample[ordinary], weight[ordinary]
    modalities = [statistics for row, statistics in observation.statistics.items() if row != massive_row]
    # Where no interval tells massive tokens, this grid serves them too.
    apart = bool((token_set == MASSIVE).any())
    pooled = reduce(ChannelStatistics.merge, modalities if apart else observation.statistics.values())
    if recipe.grid == "reference":
        return reference_grid(modalities, pooled, _together(sample, weight), recipe, full_mask=full_mask)
    # Every n-th token: a modality's share stays what its weights make it.
    stride = max(1, sample.shape[0] // SEARCH_TOKENS)
    part, part_weight = sample[::stride], weight[::stride] / weight[::stride].sum()
    grid = steps.budget_grid(
        _together(part, part_weight),
        steps.centres(part),
        pooled.minimum,
        pooled.maximum,
        matrix.square().sum(0),
        recipe.escape_budget,
    )
    return torch.full_like(grid.step, recipe.escape_budget > 0, dtype=torch.bool), grid


def _input_tensors(
    x: Tensor,
    token_set: Tensor,
    mask: Tensor,
    grid: activation.Grid,
    order: Tensor,
    intervals: massive_tokens.MassiveIntervals,
    rows: int,
) -> dict[str, Tensor]:
    """The checkpoint's tensors of one input (schema.INPUT_TENSORS), on the CPU."""
    centre, gain = grid.centre, 1.0
    massive = x[token_set == MASSIVE]
    if massive.shape[0]:
        centre = massive.mean(0)
        farthest = float(((massive - centre).abs() / grid.step).max())
        gain = max(1.0, farthest / activation.GUARD_CODES)
    return {
        "activation_step": grid.step.cpu(),
        "channel_order": order.cpu(),
        # Every channel of a massive token may escape: there are few such tokens, and all others attend to them.
        "modality_mask": torch.cat((mask.expand(rows - 1, -1), torch.ones_like(mask)[None])).cpu(),
        "centre": torch.cat((grid.centre.expand(rows - 1, -1), centre[None])).cpu(),
        "gain": torch.tensor([1.0] * (rows - 1) + [gain]),
        "massive_channel": intervals.channel.cpu(),
        "massive_low": intervals.low.cpu(),
        "massive_high": intervals.high.cpu(),
    }


def _round_weights(
    matrix: Tensor, step: Tensor, moments: second_moments.Moments, layer: LayerSpec, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """int4 codes int8 [N, K] and scale bfloat16 [N, K/G] of the 16-bit `matrix`, all in channel order."""
    absorbed = weights.absorb(matrix, step)
    target = absorbed
    if recipe.regression:
        target = second_moments.regress(moments, matrix, absorbed, recipe.shrinkage)
    hessian = moments.centred()[0]
    if recipe.rounding == "compensated":
        return quantize_compensated(target, hessian, layer.group_size, recipe.scale_levels)
    energy = hessian.diagonal().clone()
    mean = float(energy.mean())
    importance = energy.clamp(min=IMPORTANCE_FLOOR * mean) if mean > 0 else torch.ones_like(energy)
    return weights.quantize_int4(target, importance, layer.group_size)


def _escape_rates(
    codes: Tensor, tokens: TokenSample, token_set: Tensor, row_names: tuple[str, ...]
) -> dict[str, float]:
    per_token = torch.cat([activation.escapes(part).float().mean(1) for part in _chunks(codes)]).cpu()
    rates = {row: float(per_token[tokens.modality == row].mean()) for row in tokens.counts}
    total = sum(tokens.counts.values())
    overall = sum(rates[row] * count / total for row, count in tokens.counts.items())
    named = {row_names[row]: rate for row, rate in rates.items()}
    massive = token_set.cpu() == MASSIVE
    if bool(massive.any()):
        named[row_names[-1]] = float(per_token[massive].mean())
    return {**named, "all": overall}


def _output_error(
    codes: Tensor, target: Tensor, token_set: Tensor, weight: Tensor, matrix: Tensor, served: Tensor, bias: Tensor
) -> float:
    """Weighted relative error of the served layer's output against target @ matrix.T; bias [2, N] by set of tokens."""
    stride = max(1, codes.shape[0] // SEARCH_TOKENS)
    error = power = 0.0
    for part, values, which, token_weight in _together(
        *(field[::stride] for field in (codes, target, token_set, weight))
    ):
        expected = values @ matrix.T
        found = part @ served.T + bias[which]
        error += float(token_weight @ (found - expected).square().sum(1))
        power += float(token_weight @ expected.square().sum(1))
    return (error / power) ** 0.5 if power > 0 else 0.0


def _chunks(value: Tensor, columns: int | None = None) -> Iterator[Tensor]:
    """Runs of tokens of `value` [T, K], or of [T] or [T, 1] that goes with `columns` = K."""
    limit = CHUNK_ELEMENTS.get(value.device.type, CHUNK_ELEMENTS["cpu"])
    return iter(value.split(max(1, limit // (columns or value.shape[1]))))


def _together(first: Tensor, *others: Tensor) -> Iterator[Any]:
    """The same runs of tokens of several tensors [T, ...]; the first sets their length."""
    return zip(_chunks(first), *(_chunks(other, first.shape[1]) for other in others), strict=True)
