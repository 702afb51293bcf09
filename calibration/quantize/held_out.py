"""Calibration samples that no fit of weights sees. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens

# Efforts of the recipe that hold samples out: one of SAMPLES_PER_HELD, and none if there are fewer. They judge what is
# learned afterwards.
HOLDING_EFFORTS = ("default", "best")
SAMPLES_PER_HELD = 8


def is_held_sample(index: int) -> bool:
    """Whether a calibration sample is the last of every SAMPLES_PER_HELD."""
    return index % SAMPLES_PER_HELD == SAMPLES_PER_HELD - 1


def tokens_of_held_samples(tokens: DrawnTokens, effort: str) -> Tensor | None:
    """Drawn tokens of held-out samples, bool [drawn], as `is_held_sample` says; None if there are none.

    Effort `fast` holds nothing out. Every layer of the decoder holds out the same samples. So the errors that earlier
    layers made on them are those of new data. Tokens of a modality that no other sample has are not held out.
    """
    if effort not in HOLDING_EFFORTS:
        return None
    lengths = torch.tensor([positions.numel() for positions in tokens.positions])
    of_sample = torch.tensor([is_held_sample(index) for index in range(lengths.numel())], dtype=torch.bool)
    held = of_sample.repeat_interleave(lengths)
    for row in tokens.modality[held].unique():
        of_row = tokens.modality == row
        if not bool((of_row & ~held).any()):
            held &= ~of_row
    return held if bool(held.any()) else None
