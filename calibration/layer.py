"""From what calibration saw of one input to the checkpoint's tensors. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from calibration.collect import Observation
from calibration.plan import matches
from calibration.recipe import Recipe
from calibration.sampling import TokenSample
from morphoquant_vllm.numerics import activation, linear, reference, weights
from morphoquant_vllm.numerics.statistics import ChannelStatistics
from morphoquant_vllm.schema import QuantizationSpec

# Elements of a chunk of tokens: on a CPU few enough to stay near the cache, and enough that waiting for each other at
# the end of every operation costs the threads little on a busy machine; on a GPU enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
# A channel whose codes were all 0 in calibration still counts this part of the mean, so that its weights stay sane.
IMPORTANCE_FLOOR = 1e-4
# Fewer tokens than this say nothing about a channel's tail: with one token max - min is 0 on every channel, so that all
# of them (0 >= 0) are outliers, and with a few the mask is noise. Such a modality has no mask of its own.
MIN_MASK_TOKENS = 32


@dataclass(frozen=True)
class LayerRecord:
    """What the report says about one quantized linear."""

    # Codes outside [-8, 7] as a fraction of all codes, by row name; "all": of the tokens as they occur in the data.
    escape_rate: dict[str, float]
    # Root of the weighted mean square error of the output, relative to the 16-bit layer's, without bias.
    output_error: float
    # Channels that may escape, by row name.
    masked_channels: dict[str, int]
    # How many channels the guard gave a larger step than the search chose, and the largest factor.
    guard_raised_channels: int
    guard_largest_raise: float


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear's tensors, by the names of schema.tensor_specs, on the CPU, and its record."""

    tensors: dict[str, Tensor]
    record: LayerRecord


def quantize_input(
    observation: Observation,
    tokens: TokenSample,
    shards: Mapping[str, Tensor],
    spec: QuantizationSpec,
    recipe: Recipe,
) -> dict[str, QuantizedLayer]:
    """Quantize the linears `shards` (weights [N, K] by layer name) that share one input.

    Computes on the device of `observation.sample`. Every row of mask, centre and gain is the same: one pooled grid
    with the union of the modalities' masks; the format has rows so that they may differ.
    """
    sample = observation.sample
    device = sample.device
    first = spec.layers[next(iter(shards))]
    full = matches(first.shared_input, recipe.full_mask) or any(matches(name, recipe.full_mask) for name in shards)
    mask, grid = _grid(observation, tokens, recipe, full)
    step = grid.step.to(device)
    full_precision = {name: weight.to(device, torch.float32) for name, weight in shards.items()}
    absorbed = {name: weights.absorb(weight, step) for name, weight in full_precision.items()}
    order = weights.channel_order(
        torch.cat([value.cpu() for value in absorbed.values()]),
        blocks=spec.tensor_parallel if first.parallel == "row" else 1,
    )
    gain = torch.ones(1)
    # All rows are equal: one serves for every token here.
    record = activation.activation_record(grid.step, order, mask[None], grid.centre[None], gain)
    record = activation.ActivationRecord(*(field.to(device) for field in record))
    codes = torch.cat([activation.act_quant(x, _row_zero(x), record) for x in _chunks(sample)])
    importance = _importance(codes, tokens.weight.to(device))
    rows = len(spec.rows)
    shared = {
        "activation_step": grid.step,
        "channel_order": order,
        "modality_mask": mask.repeat(rows, 1),
        "centre": grid.centre.repeat(rows, 1),
        "gain": gain.repeat(rows),
    }
    escape_rate = _escape_rates(codes, tokens, spec.rows)
    quantized = {}
    for name, weight in full_precision.items():
        int4, scale = weights.quantize_int4(absorbed[name][:, order.long().to(device)], importance, first.group_size)
        bias = weights.absorbed_bias(weight, grid.centre.to(device)[None])
        stored = linear.WeightRecord(weights.pack(int4), scale, bias)
        quantized[name] = QuantizedLayer(
            tensors={
                **shared,
                "weight_codes": stored.codes.cpu(),
                "weight_scale": scale.cpu(),
                "absorbed_bias": bias.cpu().repeat(rows, 1),
            },
            record=LayerRecord(
                escape_rate=escape_rate,
                output_error=_output_error(sample, codes, tokens.weight.to(device), weight, stored),
                masked_channels={row: int(mask.sum()) for row in spec.rows},
                guard_raised_channels=int((grid.guard_raise > 1).sum()),
                guard_largest_raise=float(grid.guard_raise.max()),
            ),
        )
    return quantized


def _grid(
    observation: Observation, tokens: TokenSample, recipe: Recipe, full_mask: bool
) -> tuple[Tensor, activation.Grid]:
    """Mask bool [K] and grid [K] of one input, on the CPU."""
    modalities = [_on_cpu(statistics) for statistics in observation.statistics.values()]
    pooled = reduce(ChannelStatistics.merge, modalities)
    mask = torch.ones_like(pooled.minimum, dtype=torch.bool) if full_mask else _mask(modalities, pooled, recipe.tau)
    low, high = reference.base_range(pooled.minimum, pooled.maximum, mask)
    ratio = _search(observation.sample, tokens.weight, low, high, mask, recipe)
    return mask, activation.served_grid(ratio * low, ratio * high, pooled.minimum, pooled.maximum, mask)


def _mask(modalities: Sequence[ChannelStatistics], pooled: ChannelStatistics, tau: float) -> Tensor:
    """Union of the modalities' masks, bool [K]; the pooled statistics' where no modality has enough tokens."""
    mask = torch.zeros_like(pooled.minimum, dtype=torch.bool)
    # A modality's outliers must be able to escape, however rare its tokens are beside the others'.
    for statistics in [each for each in modalities if each.tokens >= MIN_MASK_TOKENS] or [pooled]:
        dispersion = reference.dispersion_score(statistics)
        # Without spread every channel lies at the mean, which is the threshold too: none stands out.
        if float(dispersion.std()) > 0:
            mask |= reference.outlier_mask(dispersion, tau)
    return mask


def _search(sample: Tensor, weight: Tensor, low: Tensor, high: Tensor, mask: Tensor, recipe: Recipe) -> Tensor:
    """The winning ratio of each channel, [K] on the CPU.

    One weighted mean over all sampled tokens takes the place of the reference's moving average over batches: with
    several modalities that would mostly remember the last batches, whatever their modality.
    """
    device = sample.device
    low, high, mask = low.to(device), high.to(device), mask.to(device)
    scores = torch.zeros(reference.SEARCH_RATIOS, sample.shape[1], device=device)
    for x, token_weight in zip(_chunks(sample), _chunks(weight.to(device), sample.shape[1]), strict=True):
        scores += reference.search_scores(
            x, low, high, mask, lower=recipe.lower, lam=recipe.lam, lp_norm=recipe.lp_norm, token_weight=token_weight
        )
    return reference.best_ratio(scores.cpu(), recipe.lower)


def _importance(codes: Tensor, weight: Tensor) -> Tensor:
    """Weighted E[code^2] of each channel, float32 [K] in the order of `codes` [T, K]; every value positive."""
    total = torch.zeros(codes.shape[1], device=codes.device)
    for part, token_weight in zip(_chunks(codes), _chunks(weight, codes.shape[1]), strict=True):
        total += token_weight @ part.float().square()
    mean = float(total.mean())
    return total.clamp(min=IMPORTANCE_FLOOR * mean) if mean > 0 else torch.ones_like(total)


def _escape_rates(codes: Tensor, tokens: TokenSample, row_names: tuple[str, ...]) -> dict[str, float]:
    per_token = torch.cat([activation.escapes(part).float().mean(1) for part in _chunks(codes)]).cpu()
    rates = {row: float(per_token[tokens.modality == row].mean()) for row in tokens.counts}
    total = sum(tokens.counts.values())
    overall = sum(rates[row] * count / total for row, count in tokens.counts.items())
    return {**{row_names[row]: rate for row, rate in rates.items()}, "all": overall}


def _output_error(sample: Tensor, codes: Tensor, weight: Tensor, matrix: Tensor, stored: linear.WeightRecord) -> float:
    """Weighted relative error of the integer linear layer against x @ W.T, both without the layer's own bias.

    The same sum as numerics.linear with gain 1, in float32: this is a figure for the report, about 0.1 as a rule.
    """
    error = power = 0.0
    columns = sample.shape[1]
    dequantized = weights.dequantize_weight(stored.codes, stored.scale)
    for x, part, token_weight in zip(_chunks(sample), _chunks(codes), _chunks(weight, columns), strict=True):
        expected = x @ matrix.T
        served = part.float() @ dequantized.T + stored.absorbed_bias
        error += float(token_weight @ (served - expected).square().sum(1))
        power += float(token_weight @ expected.square().sum(1))
    return (error / power) ** 0.5 if power > 0 else 0.0


def _chunks(value: Tensor, columns: int | None = None) -> Iterator[Tensor]:
    """Runs of tokens of `value` [T, K], or of [T] that goes with `columns` = K."""
    limit = CHUNK_ELEMENTS.get(value.device.type, CHUNK_ELEMENTS["cpu"])
    return iter(value.split(max(1, limit // (columns or value.shape[1]))))


def _row_zero(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)


def _on_cpu(statistics: ChannelStatistics) -> ChannelStatistics:
    return ChannelStatistics(**{name: value.cpu() for name, value in vars(statistics).items()})
