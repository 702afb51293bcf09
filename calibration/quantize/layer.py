"""From what calibration saw of one input to the checkpoint's tensors. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.data.token_choice import TokenSample
from calibration.model.plan import matches
from calibration.processes import Processes
from calibration.quantize import massive_tokens
from calibration.quantize import moments as second_moments
from calibration.quantize.chunks import chunks, together
from calibration.quantize.grids import InputGrids, find_grids, gather_evidence, input_tensors
from calibration.quantize.layer_report import ERROR_TOKENS, LayerRecord, escape_rates, output_error
from calibration.quantize.modality_rows import ModalityRow, RowChoice
from calibration.quantize.observation import Observation
from calibration.quantize.rounding import quantize_compensated, quantize_two_level
from calibration.recipe import Recipe
from morphoquant_vllm.format.schema import (
    GROUP_SCHEME,
    INPUT_TENSORS,
    TWO_LEVEL_SCHEME,
    LayerSpec,
    QuantizationSpec,
    input_blocks,
)
from morphoquant_vllm.host_memory import release_freed_memory
from morphoquant_vllm.numerics import activation, weights

# A channel whose codes were all 0 in calibration still counts this part of the mean, so that its weights stay sane.
IMPORTANCE_FLOOR = 1e-4
# Tokens whose values are multiplied by their codes at once: enough that the sums are seldom read and written.
MOMENT_TOKENS = 512
# Names under which codes and scales are stored, in the order in which rounding gives them.
_STORED = {
    GROUP_SCHEME: ("weight_codes", "weight_scale"),
    TWO_LEVEL_SCHEME: ("weight_codes", "weight_level", "weight_channel_scale"),
}


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear's tensors, by the names of schema.tensor_specs, on the CPU, and its record."""

    tensors: dict[str, Tensor]
    record: LayerRecord


@dataclass(frozen=True)
class InputSample:
    """This process's sampled tokens of one input, in the order of TokenSample."""

    # As the quantized layers before give it: what is quantized.
    observation: Observation
    # As the 16-bit model has it, float32 [own T, K]: whose outputs are aimed at.
    target: Tensor
    # Tokens with an outlying residual stream, bool [own T].
    outlying: Tensor


def quantize_input(
    inputs: InputSample,
    tokens: TokenSample,
    shards: Mapping[str, Tensor],
    spec: QuantizationSpec,
    recipe: Recipe,
) -> dict[str, QuantizedLayer]:
    """Quantize the linears `shards` (weights [N, K] by layer name) that share one input.

    Computes on the device of the sample. A modality has a centre, a gain and a bias of its own where that pays, else
    those for any token; the massive row always has.

    Each process has some of the tokens and fits some of the output channels; all have the same result. What is found by
    sums of floats that need not come out the same everywhere is found by one of them.
    """
    x, processes = inputs.observation.sample, tokens.processes
    device = x.device
    first = spec.layers[next(iter(shards))]
    blocks = input_blocks(first, spec.tensor_parallel)
    matrix = torch.cat([weight.to(device, torch.float32) for weight in shards.values()])
    weight, modality = (tokens.own(value).to(device) for value in (tokens.weight, tokens.modality))
    intervals = (
        massive_tokens.find_intervals(x, inputs.outlying.to(device), blocks, processes)
        if recipe.massive_row
        else massive_tokens.no_intervals(x.shape[1], blocks)
    )
    massive = massive_tokens.holds(x, intervals)
    massive_row = len(spec.rows) - 1
    all_massive = tokens.merge(massive).cpu()
    grids, natural = _find_input(
        inputs.observation,
        tokens,
        massive,
        intervals,
        matrix,
        spec,
        recipe,
        full_mask=_full_mask(first, shards, recipe),
    )
    step, order = grids.grid.step, natural["channel_order"]
    record = activation.activation_record(*(natural[name].to(device) for name in INPUT_TENSORS))
    # Sets of tokens that have a bias of their own: of any modality, of those with a row, massive ones.
    set_of_row = torch.zeros(len(spec.rows), dtype=torch.int64, device=device)
    set_of_row[grids.own] = torch.arange(len(grids.own), device=device) + 1
    set_of_row[massive_row] = len(grids.own) + 1
    own = torch.where(set_of_row[modality.long()] > 0, modality, spec.any_row)
    rows = torch.where(massive, massive_row, own).int()
    token_set = set_of_row[rows.long()]
    codes = torch.cat([activation.act_quant(part, row, record) for part, row in together(x, rows)])
    gathered = order.long().to(device)
    matrix = matrix[:, gathered]
    # Values in channel order are made a run of tokens at a time: whole copies of [T, K] are the most that memory holds.
    moments = second_moments.gather(
        _contributions(codes, inputs.target, gathered, rows, token_set, weight, record),
        codes,
        weight * record.gain[rows.long()].square(),
        second_moments.Moments.zeros(len(grids.own) + 2, matrix),
    )
    moments.reduce(processes)
    code_mean, value_mean = moments.means()
    channels = processes.share(matrix.shape[0])
    absorbed = weights.absorb(matrix[channels], step[gathered.to(step.device)].to(device))
    # What the runs of tokens had; the squares come next.
    release_freed_memory()
    int4, *scales = _round_weights(absorbed, moments.take_centred(channels), first, recipe)
    del moments, absorbed
    owners = processes.owners(matrix.shape[0])
    int4, *scales = (processes.merge(part, owners) for part in (int4, *scales))
    packed = weights.pack(int4)
    served = weights.dequantize_weight(packed, *scales)
    if grids.own:
        # Any token may have to be served by the row for any.
        ordinary = (~massive).nonzero().flatten()
        code_mean[0], value_mean[0] = _any_means(
            x, inputs.target, gathered, ordinary, weight, record, spec.any_row, processes
        )
    set_rows = torch.tensor([spec.any_row, *grids.own, massive_row], device=device)

    def find_bias() -> Tensor:
        bias = weights.absorbed_bias(matrix, record.centre[set_rows], blocks)
        bias += second_moments.output_bias(code_mean, value_mean, matrix, served, blocks)
        if not bool(all_massive.any()):
            bias[:, -1] = bias[:, 0]
        return bias

    bias = processes.decide(find_bias)
    common = LayerRecord(
        escape_rate=escape_rates(codes, tokens, all_massive, spec.rows),
        output_error=0.0,
        masked_channels=dict(zip(spec.rows, natural["modality_mask"].sum(1).tolist(), strict=True)),
        guard_raised_channels=int((grids.grid.guard_raise > 1).sum()),
        guard_largest_raise=float(grids.grid.guard_raise.max()),
        massive_tokens=int(all_massive.sum()),
        modality_rows={spec.rows[row]: found.choice for row, found in grids.rows.items()},
    )
    stride = max(1, all_massive.numel() // ERROR_TOKENS)
    judged = tokens.every(codes, stride).float() * record.gain[tokens.every(rows, stride).long()][:, None]
    aimed = tokens.every(inputs.target, stride).index_select(1, gathered)
    judged_set, judged_weight = tokens.every(token_set, stride), tokens.every(weight, stride)
    quantized = {}
    sizes = [value.shape[0] for value in shards.values()]
    stored = dict(zip(_STORED[first.scale_scheme], (packed, *scales), strict=True))
    parts_of = {tensor: value.split(sizes) for tensor, value in stored.items()}
    for index, (name, *parts) in enumerate(
        zip(shards, served.split(sizes), matrix.split(sizes), bias.split(sizes, 2), strict=True)
    ):
        dequantized, full, own_bias = parts
        bias_of_set = own_bias.sum(0)
        error = output_error(judged, aimed, judged_set, judged_weight, full, dequantized, bias_of_set, processes)
        quantized[name] = QuantizedLayer(
            tensors={
                **natural,
                **{tensor: split[index].contiguous().cpu() for tensor, split in parts_of.items()},
                "absorbed_bias": own_bias[:, set_of_row].contiguous().cpu(),
            },
            record=replace(common, output_error=error),
        )
    return quantized


def _find_input(
    observation: Observation,
    tokens: TokenSample,
    massive: Tensor,
    intervals: massive_tokens.MassiveIntervals,
    matrix: Tensor,
    spec: QuantizationSpec,
    recipe: Recipe,
    full_mask: bool,
) -> tuple[InputGrids, dict[str, Tensor]]:
    """Grids of an input, and its tensors, in natural channel order; massive, bool [own T], and matrix [N, K]."""
    evidence = gather_evidence(observation, tokens, massive, recipe, len(spec.rows) - 1, full_mask=full_mask)
    massive_x = tokens.merge(observation.sample, tokens.merge(massive).nonzero().flatten())

    def find() -> tuple[InputGrids, dict[str, Tensor]]:
        grids = find_grids(evidence, matrix, recipe)
        order = weights.channel_order(weights.absorb(matrix, grids.grid.step).cpu(), intervals.channel.shape[0])
        return grids, input_tensors(massive_x, grids, order, intervals, len(spec.rows), spec.any_row)

    return tokens.processes.decide(find, (InputGrids, activation.Grid, ModalityRow, RowChoice))


def _contributions(
    codes: Tensor,
    target: Tensor,
    order: Tensor,
    rows: Tensor,
    token_set: Tensor,
    weight: Tensor,
    record: activation.ActivationRecord,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """What Moments.add takes in: codes, gain, 16-bit values less the centre, set and weight of runs of tokens.

    codes [T, K] are in channel order, target [T, K] is put in it: `order` [K] are the natural channels.
    """
    gain = record.gain[rows.long()]
    each = (field.split(MOMENT_TOKENS) for field in (codes, gain, target, rows, token_set, weight))
    for part, part_gain, values, row, which, token_weight in zip(*each, strict=True):
        ordered = values.index_select(1, order)
        yield part, part_gain, ordered.sub_(record.centre[row.long()]), which, token_weight


def _any_means(
    x: Tensor,
    target: Tensor,
    order: Tensor,
    chosen: Tensor,
    weight: Tensor,
    record: activation.ActivationRecord,
    row: int,
    processes: Processes,
) -> tuple[Tensor, Tensor]:
    """Mean code times gain and mean 16-bit value less the centre, [K] each, of the tokens `chosen` of x [own T, K].

    All of them in `row`. The means are in channel order, x and target in the natural one.
    """
    weight = weight[chosen]
    total = processes.reduce(weight.sum(), "SUM")
    code_mean, value_mean = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    for part, token_weight in zip(chunks(chosen, x.shape[1]), chunks(weight, x.shape[1]), strict=True):
        rows = torch.full_like(part, row, dtype=torch.int32)
        codes = activation.act_quant(x[part], rows, record).float() * record.gain[rows.long()][:, None]
        code_mean += token_weight @ codes / total
        value_mean += token_weight @ (target[part].index_select(1, order) - record.centre[rows.long()]) / total
    return processes.reduce(code_mean, "SUM"), processes.reduce(value_mean, "SUM")


def _full_mask(first: LayerSpec, shards: Mapping[str, Tensor], recipe: Recipe) -> bool:
    return matches(first.shared_input, recipe.full_mask) or any(matches(name, recipe.full_mask) for name in shards)


def _round_weights(
    absorbed: Tensor, centred: tuple[Tensor, Tensor], layer: LayerSpec, recipe: Recipe
) -> tuple[Tensor, ...]:
    """int4 codes int8 [N, K] of the 16-bit weights times steps, `absorbed`, and their scales, all in channel order.

    `centred` as from Moments.take_centred, which it uses up. Scales are bfloat16 [N, K/G], or by the layer's scheme
    levels uint8 [N, K/G] and channel scale float32 [N].
    """
    hessian, code_output = centred
    target = second_moments.regress(hessian, code_output, absorbed, recipe.shrinkage) if recipe.regression else absorbed
    del code_output, centred
    if layer.scale_scheme == TWO_LEVEL_SCHEME:
        return quantize_two_level(target, hessian, layer.group_size, recipe.scale_levels)
    if recipe.rounding == "compensated":
        return quantize_compensated(target, hessian, layer.group_size)
    energy = hessian.diagonal().clone()
    mean = float(energy.mean())
    importance = energy.clamp(min=IMPORTANCE_FLOOR * mean) if mean > 0 else torch.ones_like(energy)
    return weights.quantize_int4(target, importance, layer.group_size)
