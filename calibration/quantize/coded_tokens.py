"""The drawn tokens of an input as they are served: their rows, their codes, and the moments of both.

Channel order is that of the checkpoint's channel_order; natural order is the source model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.processes import Processes
from calibration.quantize import moments as second_moments
from calibration.quantize.chunks import zip_chunks
from calibration.quantize.grids import FoundInput
from morphoquant_vllm.format.layers import INPUT_TENSORS
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import activation

# Tokens whose values are multiplied by their codes at once: enough that the sums are seldom read and written.
MOMENT_TOKENS = 512


@dataclass(frozen=True)
class BiasSets:
    """The sets of tokens with a separate bias: any modality, each modality with a separate row, massive tokens."""

    # The set of each row, int64 [R].
    of_row: Tensor
    # The row of each set, int64 [sets]; for the first set, the row `any`.
    row_of_set: Tensor

    @staticmethod
    def of(separate: Sequence[int], spec: QuantizationSpec, device: torch.device) -> BiasSets:
        """The sets if the modalities `separate` have separate rows."""
        rows = torch.tensor([spec.any_row, *separate, len(spec.rows) - 1], device=device)
        of_row = torch.zeros(len(spec.rows), dtype=torch.int64, device=device)
        of_row[rows[1:]] = torch.arange(1, rows.numel(), device=device)
        return BiasSets(of_row, rows)

    @property
    def any_modality_only(self) -> bool:
        """Whether no modality has a separate row."""
        return self.row_of_set.numel() == 2


@dataclass(frozen=True)
class CodedTokens:
    """This process's drawn tokens of one input, with K in channel order."""

    record: activation.ActivationRecord
    # The natural channel at each position, int64 [K].
    order: Tensor
    sets: BiasSets
    # The row that serves each token, int32 [drawn], and its set, int64 [drawn].
    rows: Tensor
    token_set: Tensor
    # The weight of each token, float32 [drawn].
    weight: Tensor
    # int8 [drawn, K].
    codes: Tensor

    def part(self, places: Tensor) -> CodedTokens:
        """Those of the tokens at `places`, int64."""
        places = places.to(self.codes.device)
        fields = {name: getattr(self, name)[places] for name in ("rows", "token_set", "weight", "codes")}
        return replace(self, **fields)

    @property
    def gain(self) -> Tensor:
        """The gain of each token's row, float32 [drawn]."""
        return self.record.gain[self.rows.long()]


def code_tokens(
    x: Tensor, tokens: DrawnTokens, massive: Tensor, found: FoundInput, spec: QuantizationSpec
) -> CodedTokens:
    """Rows and codes of x [local drawn, K], in natural order.

    massive, bool [local drawn]: the tokens of the massive row.
    """
    device = x.device
    weight, modality = (tokens.local(value).to(device) for value in (tokens.weight, tokens.modality))
    record = activation.activation_record(*(found.tensors[name].to(device) for name in INPUT_TENSORS))
    sets = BiasSets.of(found.grids.separate, spec, device)
    ordinary = torch.where(sets.of_row[modality.long()] > 0, modality, spec.any_row)
    rows = torch.where(massive, len(spec.rows) - 1, ordinary).int()
    return CodedTokens(
        record=record,
        order=found.tensors["channel_order"].long().to(device),
        sets=sets,
        rows=rows,
        token_set=sets.of_row[rows.long()],
        weight=weight,
        codes=torch.cat([activation.act_quant(part, row, record) for part, row in zip_chunks(x, rows)]),
    )


def weigh_massive_alike(coded: CodedTokens, processes: Processes) -> CodedTokens:
    """The same tokens for the moments: a massive token has at most the mean energy of the others.

    Codes of massive tokens are large, and their gain squared multiplies them. A few of them would decide the fit of all
    weights. But what follows is normed token by token, so it sees their errors relative to their size. Weights within
    the set of massive tokens keep their ratios, so its means stay as they are.
    """
    massive = coded.rows == coded.record.gain.numel() - 1
    weight = coded.weight[massive]
    codes = coded.codes[massive].float()
    sums = processes.all_reduce(torch.cat([weight @ codes, weight.sum()[None]]), "SUM")
    deviation = (codes - sums[:-1] / sums[-1].clamp(min=second_moments.TINY)).square().sum(1)
    others = torch.cat([part.float().square().sum(1) for part in coded.codes.split(MOMENT_TOKENS)])
    energy = coded.gain.square() * others.masked_scatter(massive, deviation) * coded.weight
    total = processes.all_reduce(torch.stack([energy[massive].sum(), energy.sum(), coded.weight.sum()]), "SUM").double()
    of_massive, of_others = total[0] / sums[-1], (total[1] - total[0]) / (total[2] - sums[-1])
    if not bool(of_massive > of_others):
        return coded
    return replace(coded, weight=torch.where(massive, coded.weight * float(of_others / of_massive), coded.weight))


def gather_moments(coded: CodedTokens, x16: Tensor, matrix: Tensor, processes: Processes) -> second_moments.Moments:
    """Moments of the tokens of all processes: x16 [local drawn, K] in natural order, matrix [N, K] in channel order."""
    moments = second_moments.gather(
        _contributions(coded, x16),
        coded.codes,
        coded.weight * coded.gain.square(),
        second_moments.Moments.zeros(coded.sets.row_of_set.numel(), matrix),
    )
    moments.reduce(processes)
    return moments


def _contributions(coded: CodedTokens, x16: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The arguments of Moments.add: codes, gain, 16-bit values less the centre, set and weight of runs of tokens.

    Values are put in channel order one run at a time, since a whole copy of [drawn, K] would set the peak of memory.
    """
    fields = (coded.codes, coded.gain, x16, coded.rows, coded.token_set, coded.weight)
    for codes, gain, values, row, token_set, weight in zip(*(f.split(MOMENT_TOKENS) for f in fields), strict=True):
        ordered = values.index_select(1, coded.order)
        yield codes, gain, ordered.sub_(coded.record.centre[row.long()]), token_set, weight
