"""A separate row for a modality: its centre and gain, if held-out tokens show that it lowers the error. Pure.

All rows of a layer share the steps, since the weights absorb them. A modality can have a separate centre, gain and
bias. These are the place of its grid, the width of all its steps, and the correction of its mean error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.quantize import step_search
from morphoquant_vllm.numerics.activation import GUARD_CODES, Grid, code_limits, escapes

# With fewer tokens, neither the search of a row nor its judgement is reliable.
MIN_TOKENS = 64
# The most tokens on which a row is searched, and the most on which it is judged.
ROW_TOKENS = 512
# The drawn tokens are cut into this many runs, used for search and judgement in turns: neighbours are much alike.
RUNS = 8
# Gains to choose from: around 1, the gain of the row that serves any token.
GAINS = torch.logspace(-3, 1, 33, base=2.0)


@dataclass(frozen=True)
class RowChoice:
    """Whether a modality has a separate row in a layer or shares `any`, and why."""

    # Field names are those of the report; "own" is its word for a separate row.
    own: bool
    reason: str
    # Gain of the row that serves the modality.
    gain: float
    # On held-out tokens: the relative error of the layer's output by rounding activations, and the escape rate. Each
    # with the row `any`, and with a separate row. None if there are too few tokens.
    any_error: float | None = None
    own_error: float | None = None
    any_escape_rate: float | None = None
    own_escape_rate: float | None = None


@dataclass(frozen=True)
class RowTokens:
    """A modality's ordinary tokens: their number, and those [tokens, K] on which a row is searched and judged."""

    count: int
    searched: Tensor
    held: Tensor

    @staticmethod
    def of(x: Tensor) -> RowTokens:
        """Split all ordinary tokens x [tokens, K] of a modality."""
        searched, held = (x[index] for index in row_tokens(torch.arange(x.shape[0])))
        return RowTokens(x.shape[0], searched, held)


def row_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The ordinary tokens [tokens] of a modality, in order, that search a row, and those that judge it."""
    runs = tokens.tensor_split(RUNS)
    searched, held = (_thinned(torch.cat(runs[first::2])) for first in (0, 1))
    return searched, held


@dataclass(frozen=True)
class ModalityRow:
    """Centre float32 [K] of the row that serves a modality, and the choice that led to it, its gain included."""

    centre: Tensor
    choice: RowChoice


def choose_row(
    tokens: RowTokens,
    minimum: Tensor,
    maximum: Tensor,
    grid: Grid,
    mask: Tensor,
    matrix: Tensor,
    budget: float,
    margin: float,
) -> ModalityRow:
    """The row of one modality, from its ordinary drawn tokens.

    minimum, maximum [K]: of every token that the row serves. grid, mask [K]: of the row `any`. The modality keeps that
    row unless a separate one lowers the error of outputs by the fraction `margin`. The error is that of x @ matrix.T on
    held-out tokens x. At most `budget` of the separate row's codes may escape on the searched tokens.
    """
    if tokens.count < MIN_TOKENS:
        reason = f"{tokens.count} ordinary tokens, fewer than {MIN_TOKENS}"
        return ModalityRow(grid.centre, RowChoice(False, reason, 1.0))
    searched, held = tokens.searched, tokens.held
    importance = matrix.square().sum(0)
    # For a heavy-tailed channel the common centre may be better than the middle of the modality's quantiles.
    _, gain, centre = min(
        (
            (*_gain(searched, centre, minimum, maximum, grid.step, mask, importance, budget), centre)
            for centre in (grid.centre, step_search.centres(searched))
        ),
        key=lambda found: found[0],
    )
    power = float((held @ matrix.T).square().sum().clamp(min=torch.finfo(torch.float32).tiny))
    errors, rates = [], []
    for row_centre, row_gain in ((grid.centre, 1.0), (centre, gain)):
        searched_error, _ = _rounding(searched, row_centre, grid.step * row_gain, mask)
        held_error, codes = _rounding(held, row_centre, grid.step * row_gain, mask)
        # The bias corrects the mean error, as measured on the searched tokens.
        output_error = (held_error - searched_error.mean(0)) @ matrix.T
        errors.append((float(output_error.square().sum()) / power) ** 0.5)
        rates.append(float(escapes(codes).float().mean()))
    separate = errors[0] > 0 and errors[1] <= (1 - margin) * errors[0]
    change = f"error on held-out tokens {errors[1] / errors[0] - 1:+.1%}" if errors[0] else "no error to lower"
    choice = RowChoice(separate, change, gain if separate else 1.0, errors[0], errors[1], rates[0], rates[1])
    return ModalityRow(centre if separate else grid.centre, choice)


def _thinned(x: Tensor) -> Tensor:
    return x[:: max(1, -(-x.shape[0] // ROW_TOKENS))]


def _rounding(x: Tensor, centre: Tensor, step: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rounding errors of x [tokens, K], and its codes, both float32 [tokens, K] in natural channel order."""
    low, high = code_limits(mask)
    distance = x - centre
    codes = torch.minimum(torch.maximum(torch.round(distance / step), low), high)
    return codes * step - distance, codes


def _gain(
    x: Tensor,
    centre: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    step: Tensor,
    mask: Tensor,
    importance: Tensor,
    budget: float,
) -> tuple[float, float]:
    """Least error and its gain, among gains that keep the budget and masked codes within the guard."""
    farthest = torch.maximum((maximum - centre).abs(), (minimum - centre).abs())
    least = float((farthest / step)[mask].max()) / GUARD_CODES if bool(mask.any()) else 0.0
    best, least_error = max(1.0, least), float("inf")
    for gain in GAINS.tolist():
        if gain < least:
            continue
        error, codes = _rounding(x, centre, step * gain, mask)
        total = float((error.square().mean(0) * importance).sum())
        if total < least_error and float(escapes(codes).float().mean()) <= budget:
            best, least_error = gain, total
    return least_error, best
