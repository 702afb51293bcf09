"""The figures of each quantized linear in the report. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.processes import ONE, Processes
from calibration.quantize.chunks import chunks
from calibration.quantize.coded_tokens import CodedTokens
from calibration.quantize.grids import FoundInput
from calibration.quantize.modality_rows import RowChoice
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.schema import MASSIVE_ROW
from morphoquant_vllm.numerics import activation

# The output error is measured on about this many tokens.
ERROR_TOKENS = 2048
# An escape rate of this many times the budget is a warning: the drawn tokens do not stand for the others.
FAR_ABOVE = 2.0
# Tokens that are multiplied at once: enough that weights are seldom read.
RUN_TOKENS = 256


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one quantized linear in the report."""

    # Codes outside [-8, 7] as a fraction of all codes, by row name; "all" counts tokens as they occur in the data.
    escape_rate: dict[str, float]
    # Root of the weighted mean square error of the output, relative to the 16-bit layer's on 16-bit inputs (no bias).
    output_error: float
    # Channels that may escape, by row name.
    masked_channels: dict[str, int]
    # How many channels the guard gave a larger step than the search chose, and the largest factor.
    guard_raised_channels: int
    guard_largest_raise: float
    # Drawn tokens that the massive row serves.
    massive_tokens: int
    # By modality: whether a separate row serves it, and why; empty if the recipe wants no modality-specific rows.
    modality_rows: dict[str, RowChoice] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertsFigures:
    """The figures of one layer's routed experts in the report; lists have an entry per expert."""

    # Tokens of all samples that chose each expert in the served stream, and the drawn ones among them.
    tokens: list[int]
    drawn_tokens: list[int]
    # Experts with fewer drawn tokens than they need alone, and those without any, which are rounded plainly.
    few: int
    none: int
    # Of the one input of gate and up; its output_error is the mean over experts.
    input: LayerFigures
    # Output errors of gate and up together, and of down, over the tokens that chose the expert; None without any.
    gate_up_error: list[float | None]
    down_error: list[float | None]
    # Escapes of down's codes as a fraction of all.
    down_escape_rate: list[float | None]

    @property
    def errors(self) -> list[float]:
        """The errors of all inputs of experts that saw tokens."""
        return [error for error in (*self.gate_up_error, *self.down_error) if error is not None]


@dataclass(frozen=True)
class ErrorTokens:
    """This process's tokens on which the output error is measured, with K in channel order."""

    # Codes times gain, and 16-bit values: float32 [tokens, K].
    codes: Tensor
    sixteen_bit: Tensor
    # The set of each token, int64 [tokens], and its weight, float32 [tokens].
    token_set: Tensor
    weight: Tensor

    @staticmethod
    def of(coded: CodedTokens, x16: Tensor, tokens: DrawnTokens) -> ErrorTokens:
        """Every n-th token of all processes; x16 [local drawn, K] is in natural order."""
        stride = max(1, tokens.modality.numel() // ERROR_TOKENS)
        return ErrorTokens(
            codes=tokens.every(coded.codes, stride).float() * tokens.every(coded.gain, stride)[:, None],
            sixteen_bit=tokens.every(x16, stride).index_select(1, coded.order),
            token_set=tokens.every(coded.token_set, stride),
            weight=tokens.every(coded.weight, stride),
        )


def input_figures(
    coded: CodedTokens, tokens: DrawnTokens, massive: Tensor, found: FoundInput, row_names: tuple[str, ...]
) -> LayerFigures:
    """The figures common to the linears that share an input, without output_error; massive is bool [drawn]."""
    guard_raise = found.grids.grid.guard_raise
    masked = found.tensors["modality_mask"].sum(1).tolist()
    return LayerFigures(
        escape_rate=escape_rates(coded.codes, tokens, massive, row_names),
        output_error=0.0,
        masked_channels=dict(zip(row_names, masked, strict=True)),
        guard_raised_channels=int((guard_raise > 1).sum()),
        guard_largest_raise=float(guard_raise.max()),
        massive_tokens=int(massive.sum()),
        modality_rows={row_names[row]: modality.choice for row, modality in found.grids.modality_rows.items()},
    )


def escape_rates(codes: Tensor, tokens: DrawnTokens, massive: Tensor, row_names: tuple[str, ...]) -> dict[str, float]:
    """Escapes as a fraction of codes [local drawn, K], as LayerFigures holds them.

    massive, bool [drawn]: the tokens of all processes that took the last row.
    """
    local = torch.cat([activation.escapes(part).float().mean(1) for part in chunks(codes)])
    per_token = tokens.all_gather(local).cpu()
    rates = {row: float(per_token[tokens.modality == row].mean()) for row in tokens.counts}
    total = sum(tokens.counts.values())
    overall = sum(rates[row] * count / total for row, count in tokens.counts.items())
    named = {row_names[row]: rate for row, rate in rates.items()}
    if bool(massive.any()):
        named[row_names[-1]] = float(per_token[massive.cpu()].mean())
    return {**named, "all": overall}


def escape_warning(layer: str, figures: LayerFigures, recipe: Recipe, drawn: Mapping[str, int]) -> str | None:
    """A sentence about a layer whose escape rate is far above the budget; None if it is not, or without a budget.

    `drawn` counts the drawn tokens by row name. Massive tokens are not judged: they may escape on every channel.
    """
    if recipe.grid != "budget" or not recipe.escape_budget:
        return None
    massive = figures.escape_rate.get(MASSIVE_ROW, 0.0) * figures.massive_tokens
    # As if all massive tokens were of this modality.
    rates = {row: figures.escape_rate[row] - massive / count for row, count in drawn.items() if count}
    row = max(rates, key=lambda name: rates[name])
    if rates[row] <= FAR_ABOVE * recipe.escape_budget:
        return None
    return (
        f"{layer}: {rates[row]:.0%} of the codes of {row} tokens escape, far above escape_budget = "
        f"{recipe.escape_budget:.0%}; its tokens repeat or differ in kind: give more varied data"
    )


def output_error(
    tokens: ErrorTokens, matrix: Tensor, served: Tensor, bias: Tensor, processes: Processes = ONE
) -> float:
    """Weighted relative error of the served layer's output against that of the 16-bit weights `matrix` [N, K].

    served is float32 [N, K], bias [sets, N] by set of tokens. Each process has some of the tokens.
    """
    error = power = 0.0
    values_of = (tokens.codes, tokens.sixteen_bit, tokens.token_set, tokens.weight)
    for part, values, which, weight in zip(*(value.split(RUN_TOKENS) for value in values_of), strict=True):
        expected = values @ matrix.T
        found = part @ served.T + bias[which]
        error += float(weight @ (found - expected).square().sum(1))
        power += float(weight @ expected.square().sum(1))
    error, power = processes.all_reduce(torch.tensor([error, power], dtype=torch.float64), "SUM").tolist()
    return (error / power) ** 0.5 if power > 0 else 0.0
