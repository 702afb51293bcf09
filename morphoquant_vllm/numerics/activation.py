"""The served form of the activation quantizer: escape mode, in which an outlier keeps an 8-bit code.

    inverse[r, k] = 1 / (step[k] * gain[r])
    code[m, k]    = clamp(rint((x[m, k] - centre[r, k]) * inverse[r, k]), low, high),   r = modality row of token m

in float32, half to even; NaN becomes 0, +-inf the limit. [low, high] is the 4-bit [-8, 7], or the 8-bit [-128, 127]
for channels masked in row r. Masked values outside [-8, 7] are *escapes*. This defines the served codes; the
reference's round(inverse * x - zero_point) may differ from them by one code at ties.

A *massive* token (usually the first of a sequence) is recognised by its values: they lie within the intervals of a few
channels. It takes the last row, whatever its modality. Calibration gives that row a separate centre, gain and mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from morphoquant_vllm.numerics import reference
from morphoquant_vllm.numerics.reference import CODE_MAX, CODE_MIN

ESCAPE_MIN, ESCAPE_MAX = -128, 127
# Largest code of the values seen in calibration: leaves room for slightly larger values when serving.
GUARD_CODES = 120
# A channel with an empty range gets this fraction of the layer's median step, which keeps its inverse finite.
STEP_FLOOR = 1e-3


class ActivationRecord(NamedTuple):
    """The quantizer of one layer's input. K follows the permuted channel order; R counts the modality rows."""

    inverse: Tensor  # float32 [R, K]
    centre: Tensor  # float32 [R, K]
    mask: Tensor  # bool [R, K]
    gain: Tensor  # float32 [R]
    channel_order: Tensor  # int32 [K]: position -> channel of x
    # B sets of J intervals: a token is massive if any set holds it. Channels of x, not positions.
    massive_channel: Tensor  # int32 [B, J]
    massive_low: Tensor  # float32 [B, J]
    massive_high: Tensor  # float32 [B, J]; below massive_low if the set matches no token


class Grid(NamedTuple):
    """Step and centre of each channel, float32 [K], and the factor >= 1 by which the guard raised the step."""

    step: Tensor
    centre: Tensor
    guard_raise: Tensor


def served_grid(
    range_min: Tensor, range_max: Tensor, minimum: Tensor, maximum: Tensor, mask: Tensor, gain: float = 1.0
) -> Grid:
    """Turn the reference's ranges [K] into a grid that integers can serve.

    The centre is the reference's zero point times its step. It is 0 on two-sided ranges, whose rounding of +-7.5 in
    the reference depends on float noise. On masked channels the step is raised until all values seen in calibration
    (minimum, maximum) lie within GUARD_CODES. Dead channels get a floor, so every step is positive and finite.
    """
    inverse = reference.inverse_step(range_min, range_max)
    step = 1 / inverse
    offset = reference.zero_point(range_min, inverse)
    two_sided = range_min * range_max <= 0
    centre = torch.where(two_sided, 0.0, offset * step)
    farthest = torch.maximum((maximum - centre).abs(), (minimum - centre).abs())
    guarded = torch.where(mask, torch.maximum(step, farthest / (GUARD_CODES * gain)), step)
    return Grid(floor_dead(guarded), centre, torch.where(is_dead(guarded), 1.0, guarded / step))


def is_dead(step: Tensor) -> Tensor:
    """Channels that never varied, by their step [K]: bool [K]."""
    return step <= 2 * reference.MIN_RANGE_WIDTH / reference.LEVELS


def floor_dead(step: Tensor) -> Tensor:
    """`step` [K] with dead channels raised to STEP_FLOOR of the live ones' median; 1 if the whole layer is dead."""
    dead = is_dead(step)
    live = step[~dead]
    floor = STEP_FLOOR * live.median() if live.numel() else torch.tensor(1.0)
    return torch.where(dead, floor, step)


def inverse_steps(step: Tensor, gain: Tensor) -> Tensor:
    """1 / (step * gain) as float32 [R, K], from step [K] and gain [R]: computed only here, for every backend."""
    return 1.0 / (step.float()[None, :] * gain.float()[:, None])


def activation_record(
    step: Tensor,
    channel_order: Tensor,
    mask: Tensor,
    centre: Tensor,
    gain: Tensor,
    massive_channel: Tensor,
    massive_low: Tensor,
    massive_high: Tensor,
) -> ActivationRecord:
    """Gather a checkpoint's tensors (natural channel order) into the permuted order in which codes are computed."""
    order = channel_order.long()
    return ActivationRecord(
        inverse=inverse_steps(step, gain)[:, order].contiguous(),
        centre=centre.float()[:, order].contiguous(),
        mask=mask[:, order].contiguous(),
        gain=gain.float().contiguous(),
        channel_order=channel_order.int().contiguous(),
        massive_channel=massive_channel.int().contiguous(),
        massive_low=massive_low.float().contiguous(),
        massive_high=massive_high.float().contiguous(),
    )


def code_limits(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest code of each element of `mask` (bool, any shape), as float32."""
    low = torch.where(mask, float(ESCAPE_MIN), float(CODE_MIN))
    return low, torch.where(mask, float(ESCAPE_MAX), float(CODE_MAX))


def is_massive(x: Tensor, channel: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Which tokens of x [M, K] lie within all J intervals of any of the B sets, bool [M]; NaN lies in none.

    channel int32, low and high float32, each [B, J].
    """
    values = x.index_select(1, channel.flatten()).float().unflatten(1, channel.shape)
    return ((values >= low) & (values <= high)).all(-1).any(-1)


def token_rows(x: Tensor, modality: Tensor, record: ActivationRecord) -> Tensor:
    """Row that serves each token of x [M, K], int32 [M]: its modality's, or the last one if it is massive."""
    massive = is_massive(x, record.massive_channel, record.massive_low, record.massive_high)
    return torch.where(massive, record.gain.numel() - 1, modality)


def act_quant(x: Tensor, rows: Tensor, record: ActivationRecord) -> Tensor:
    """Codes int8 [M, K] in permuted order, of x [M, K] (any float dtype); rows int32 [M], as from `token_rows`."""
    if x.dim() != 2 or x.shape[1] != record.channel_order.numel():
        raise ValueError(f"act_quant needs x as [M, {record.channel_order.numel()}], got {list(x.shape)}")
    if rows.shape != x.shape[:1]:
        raise ValueError(f"act_quant needs one row per token: {list(rows.shape)} for M = {x.shape[0]}")
    x = x.float().index_select(1, record.channel_order)
    inverse, centre, mask = record[:3]
    if record.gain.numel() > 1:
        inverse, centre, mask = (field.index_select(0, rows) for field in (inverse, centre, mask))
    low, high = code_limits(mask)
    codes = torch.round((x - centre) * inverse)
    codes = torch.where(codes.isnan(), 0.0, codes)
    return torch.minimum(torch.maximum(codes, low), high).to(torch.int8)


def dequantize(codes: Tensor, rows: Tensor, record: ActivationRecord) -> Tensor:
    """The activation of codes [M, K] of tokens in `rows` [M], float32 [M, K], in permuted order."""
    return codes.float() / record.inverse[rows.long()] + record.centre[rows.long()]


def escapes(codes: Tensor) -> Tensor:
    """True for codes outside the 4-bit grid, bool, shape of `codes`."""
    return (codes < CODE_MIN) | (codes > CODE_MAX)
