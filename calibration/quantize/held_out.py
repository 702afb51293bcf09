"""Calibration samples that no fit of weights sees, and the choices that they make between fits. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.processes import Processes
from calibration.quantize.moments import Moments

T = TypeVar("T")

# Efforts of the recipe that hold samples out: one of SAMPLES_PER_HELD, and none if there are fewer. They judge what is
# learned afterwards, and with `best` they also choose between fits.
HOLDING_EFFORTS = ("default", "best")
SAMPLES_PER_HELD = 8


def held_out(tokens: DrawnTokens, effort: str) -> Tensor | None:
    """Drawn tokens of held-out samples, bool [T]: the last of every SAMPLES_PER_HELD; None if there are none.

    Effort `fast` holds nothing out. Every layer of the decoder holds out the same samples. So the errors that earlier
    layers made on them are those of new data. Tokens of a modality that no other sample has are not held out.
    """
    if effort not in HOLDING_EFFORTS:
        return None
    lengths = torch.tensor([positions.numel() for positions in tokens.positions])
    last = torch.arange(lengths.numel()) % SAMPLES_PER_HELD == SAMPLES_PER_HELD - 1
    held = last.repeat_interleave(lengths)
    for row in tokens.modality[held].unique():
        of_row = tokens.modality == row
        if not bool((of_row & ~held).any()):
            held &= ~of_row
    return held if bool(held.any()) else None


@dataclass(frozen=True)
class HeldMoments:
    """Second moments of held-out tokens about their means, for some of the output channels."""

    # Codes times codes [K, K], and times the outputs of the 16-bit layer [K, n].
    code_code: Tensor
    code_output: Tensor

    @staticmethod
    def of(moments: Moments, channels: slice) -> HeldMoments:
        """Those of `moments`, whose second moments are empty afterwards."""
        return HeldMoments(*moments.take_centred(channels))

    def error(self, weights: Tensor) -> Tensor:
        """Square error of the outputs that `weights` [n, K] make of the codes, less a constant: float64 []."""
        return (weights @ self.code_code - 2 * self.code_output.T).mul_(weights).double().sum()

    def best(self, candidates: Iterable[tuple[Tensor, T]], processes: Processes) -> T:
        """The second part of the candidate whose first, weights [n, K], has the least error; the first of equals.

        Each process has its output channels of the weights. All choose the same, by the error of all channels.
        """
        least, best = float("inf"), None
        for weights, value in candidates:
            error = float(processes.all_reduce(self.error(weights), "SUM"))
            if best is None or error < least:
                least, best = error, value
        assert best is not None
        return best
