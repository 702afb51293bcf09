"""A row of its own for a modality: its centre and gain, where held-back tokens show that it pays. Pure.

Steps are shared by all rows of a layer, since the weights absorb them. What a modality can have to itself is where its
channels lie (centre), how coarse its grid is as a whole (gain), and the mean error that its bias takes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.quantize import step_search as steps
from morphoquant_vllm.numerics.activation import GUARD_CODES, Grid, code_limits, escapes

# From fewer tokens nothing can be learnt and held back.
MIN_TOKENS = 64
# Most tokens that a row is sought on, and that it is judged on.
SEARCH_TOKENS = 512
# The sample is cut into this many runs of tokens, sought on and judged on in turns: neighbours are much alike.
RUNS = 8
# Gains to choose from: around 1, the gain of the row that serves any token.
GAINS = torch.logspace(-3, 1, 33, base=2.0)


@dataclass(frozen=True)
class RowChoice:
    """Why a modality has a row of its own in a layer, or shares that of any token."""

    own: bool
    reason: str
    # Of the row that serves the modality.
    gain: float
    # Relative error of the layer's output on held-back tokens that rounding activations makes, and their escape rate:
    # with the row for any token, and with one of the modality's own. None where too few tokens were there to tell.
    any_error: float | None = None
    own_error: float | None = None
    any_escape_rate: float | None = None
    own_escape_rate: float | None = None


@dataclass(frozen=True)
class RowTokens:
    """A modality's ordinary tokens: how many there are, and those [T, K] that a row is sought on and judged on."""

    count: int
    sought: Tensor
    held: Tensor

    @staticmethod
    def of(x: Tensor) -> RowTokens:
        """From all of them, x [T, K]."""
        sought, held = (x[index] for index in row_tokens(torch.arange(x.shape[0])))
        return RowTokens(x.shape[0], sought, held)


def row_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of a modality's ordinary tokens [T], in order, those that a row is sought on and those that it is judged on."""
    runs = tokens.tensor_split(RUNS)
    sought, held = (_thinned(torch.cat(runs[first::2])) for first in (0, 1))
    return sought, held


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
    """The row of one modality, from its ordinary tokens of the sample.

    minimum, maximum [K]: of every token that the row serves. grid, mask [K]: of the row that serves any token; the
    modality keeps it unless a row of its own lowers the error of the outputs x @ matrix.T on held-back tokens x by the
    part `margin`, with at most `budget` of its codes escaping where it is sought.
    """
    if tokens.count < MIN_TOKENS:
        reason = f"{tokens.count} ordinary tokens, fewer than {MIN_TOKENS}"
        return ModalityRow(grid.centre, RowChoice(False, reason, 1.0))
    sought, held = tokens.sought, tokens.held
    share = matrix.square().sum(0)
    # A heavy-tailed channel may be better off with the common centre than with the middle of its own quantiles.
    _, gain, centre = min(
        (
            (*_gain(sought, centre, minimum, maximum, grid.step, mask, share, budget), centre)
            for centre in (grid.centre, steps.centres(sought))
        ),
        key=lambda found: found[0],
    )
    power = float((held @ matrix.T).square().sum().clamp(min=torch.finfo(torch.float32).tiny))
    errors, rates = [], []
    for row_centre, row_gain in ((grid.centre, 1.0), (centre, gain)):
        learnt, _ = _rounding(sought, row_centre, grid.step * row_gain, mask)
        lost, codes = _rounding(held, row_centre, grid.step * row_gain, mask)
        # A bias takes back the mean error, as far as tokens that were not held back show it.
        errors.append((float(((lost - learnt.mean(0)) @ matrix.T).square().sum()) / power) ** 0.5)
        rates.append(float(escapes(codes).float().mean()))
    own = errors[0] > 0 and errors[1] <= (1 - margin) * errors[0]
    change = f"error on held-back tokens {errors[1] / errors[0] - 1:+.1%}" if errors[0] else "no error to lower"
    choice = RowChoice(own, change, gain if own else 1.0, errors[0], errors[1], rates[0], rates[1])
    return ModalityRow(centre if own else grid.centre, choice)


def _thinned(x: Tensor) -> Tensor:
    return x[:: max(1, -(-x.shape[0] // SEARCH_TOKENS))]


def _rounding(x: Tensor, centre: Tensor, step: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What rounding x [T, K] to codes loses, and the codes, both float32 [T, K] in natural channel order."""
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
    share: Tensor,
    budget: float,
) -> tuple[float, float]:
    """Least error and its gain, of those that keep the budget and let masked codes reach no further than the guard."""
    farthest = torch.maximum((maximum - centre).abs(), (minimum - centre).abs())
    least = float((farthest / step)[mask].max()) / GUARD_CODES if bool(mask.any()) else 0.0
    best, least_error = max(1.0, least), float("inf")
    for gain in GAINS.tolist():
        if gain < least:
            continue
        lost, codes = _rounding(x, centre, step * gain, mask)
        error = float((lost.square().mean(0) * share).sum())
        if error < least_error and float(escapes(codes).float().mean()) <= budget:
            best, least_error = gain, error
    return least_error, best
