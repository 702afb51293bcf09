"""Tokens that no fit sees, and the strength of the regression that they choose. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.data.token_choice import TokenSample
from calibration.processes import Processes
from calibration.quantize.moments import Moments, regress

# One of this many calibration samples is held out; there is no choice with fewer samples.
SAMPLES_PER_HELD = 16
# Candidates, times the recipe's shrinkage.
STRENGTHS = (1.0, 4.0, 16.0, 64.0)


def held_out(tokens: TokenSample) -> Tensor | None:
    """Drawn tokens of the last of every SAMPLES_PER_HELD samples, bool [T]; None if there are too few samples.

    Whole samples are held out, in every layer the same. So the earlier layers' errors on them are those of new data.
    """
    if len(tokens.positions) < SAMPLES_PER_HELD:
        return None
    lengths = torch.tensor([positions.numel() for positions in tokens.positions])
    last = torch.arange(len(tokens.positions)) % SAMPLES_PER_HELD == SAMPLES_PER_HELD - 1
    chosen = last.repeat_interleave(lengths)
    return chosen if bool(chosen.any()) else None


@dataclass(frozen=True)
class HeldMoments:
    """Second moments of the held-out tokens, about their means, for some of the output channels."""

    # Codes times codes [K, K], and times the outputs of the 16-bit layer [K, n].
    code_code: Tensor
    code_output: Tensor

    @staticmethod
    def of(moments: Moments, channels: slice) -> HeldMoments:
        """Those of `moments`, which are empty afterwards."""
        return HeldMoments(*moments.take_centred(channels))

    def error(self, weights: Tensor) -> Tensor:
        """Square error of the outputs of `weights` [n, K] on the codes, less a constant: float64 []."""
        product = (weights @ self.code_code - 2 * self.code_output.T).mul_(weights)
        return product.double().sum()


def regress_by_held(
    code_code: Tensor,
    code_output: Tensor,
    absorbed: Tensor,
    shrinkage: float,
    held: HeldMoments,
    processes: Processes,
) -> Tensor:
    """`regress` with that of STRENGTHS times `shrinkage` whose weights have the least error on held-out tokens.

    Weights [n, K] are those of this process's output channels. All processes choose the same strength, by all channels.
    """
    best, least = absorbed, float("inf")
    for strength in STRENGTHS:
        found = regress(code_code, code_output.clone(), absorbed, strength * shrinkage)
        error = float(processes.all_reduce(held.error(found), "SUM"))
        if error < least:
            best, least = found, error
    return best
