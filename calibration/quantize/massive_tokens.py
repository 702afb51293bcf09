"""Massive tokens: a few tokens whose activations are unlike all others, and the intervals that recognize them.

Usually it is the first token of a sequence. Some block gives its residual stream values hundreds of times larger than
any other. From there on its normalised activations are nearly the same in every sequence: attention parks on it. Such
tokens must not set static ranges. They get a separate row, whose centre is their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.processes import ONE, Processes
from morphoquant_vllm.format.layers import MASSIVE_CHANNELS
from morphoquant_vllm.numerics.activation import is_massive

# A token is outlying if the norm of its residual stream is this many times the median of its modality, ...
NORM_RATIO = 8.0
# ... unless more than this fraction of the tokens qualify: then they are not exceptional.
MAX_SHARE = 0.1
# With fewer massive tokens, intervals are not reliable.
MIN_TOKENS = 4
# Margin on either side of the massive values, as a fraction of the distance to the nearest value of another token.
ROOM = 0.5
# Intervals may hold at most this fraction of the other tokens.
MAX_FALSE_SHARE = 1e-3
# Channels that are searched at once.
CHANNELS = 64
LARGEST = torch.finfo(torch.float32).max


class MassiveIntervals(NamedTuple):
    """The format's massive_channel int32, massive_low and massive_high float32, each [blocks, MASSIVE_CHANNELS]."""

    channel: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class MassiveTokens:
    """The drawn tokens that the massive row serves."""

    intervals: MassiveIntervals
    # Among this process's tokens, bool [local drawn], on their device.
    local: Tensor
    # Among the tokens of all processes, bool [drawn], on the CPU.
    all: Tensor


def find_massive(x: Tensor, outlying: Tensor, blocks: int, tokens: DrawnTokens, *, wanted: bool) -> MassiveTokens:
    """Intervals that separate the tokens `outlying` of x [local drawn, K], and the tokens that they hold.

    outlying is bool [local drawn]. Unless `wanted`, the intervals hold no token.
    """
    intervals = (
        find_intervals(x, outlying.to(x.device), blocks, tokens.processes)
        if wanted
        else no_intervals(x.shape[1], blocks)
    )
    local = holds(x, intervals)
    return MassiveTokens(intervals, local, tokens.all_gather(local).cpu())


def outlying_tokens(norms: Tensor, modality: Tensor, processes: Processes = ONE) -> Tensor:
    """Tokens with an outlying residual norm, bool [tokens], from norms [tokens] and modality ids [tokens].

    Each process has some of the tokens. They are compared with those of all processes.
    """
    parts = processes.all_gather((norms, modality))
    found = _outlying_tokens(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return found.split([part.numel() for part, _ in parts])[processes.rank]


def _outlying_tokens(norms: Tensor, modality: Tensor) -> Tensor:
    found = torch.zeros_like(norms, dtype=torch.bool)
    for row in modality.unique():
        of_row = modality == row
        outlying = of_row & (norms > NORM_RATIO * norms[of_row].median())
        if int(outlying.sum()) <= MAX_SHARE * int(of_row.sum()):
            found |= outlying
    return found


def no_intervals(in_features: int, blocks: int) -> MassiveIntervals:
    """Intervals that hold no token."""
    shape = (blocks, MASSIVE_CHANNELS)
    channel = (torch.arange(blocks, dtype=torch.int32) * (in_features // blocks))[:, None].expand(shape).contiguous()
    return MassiveIntervals(channel, torch.full(shape, LARGEST), torch.full(shape, -LARGEST))


def find_intervals(x: Tensor, massive: Tensor, blocks: int, processes: Processes = ONE) -> MassiveIntervals:
    """Intervals of a few channels of x float32 [drawn, K] that separate the tokens `massive` from the others.

    massive is bool [drawn]. Each of `blocks` equal blocks of K gets a set of intervals of its channels, since a
    tensor-parallel rank sees no others. If no channels of a block separate the tokens, its intervals hold no token.
    Each process has some tokens.
    """
    intervals = no_intervals(x.shape[1], blocks)
    inside, outside = (_count(int(which.sum()), processes) for which in (massive, ~massive))
    if inside < MIN_TOKENS or not outside:
        return intervals
    width = x.shape[1] // blocks
    for block in range(blocks):
        start = block * width
        inner, others = (x[which, start : start + width] for which in (massive, ~massive))
        found = _separate(inner, others, MAX_FALSE_SHARE * outside, processes)
        if found is not None:
            channel, low, high = found
            intervals.channel[block] = channel + start
            intervals.low[block], intervals.high[block] = low, high
    return intervals


def _count(tokens: int, processes: Processes) -> int:
    return int(processes.all_reduce(torch.tensor(tokens), "SUM"))


def _extreme(values: Tensor, operation: str, processes: Processes) -> Tensor:
    """The MIN or MAX over the values [tokens, K] of all processes, by channel; infinite without tokens."""
    least = operation == "MIN"
    none = values.new_full(values.shape[1:], float("inf") if least else -float("inf"))
    local = (values.amin(0) if least else values.amax(0)) if values.shape[0] else none
    return processes.all_reduce(local, operation)


def _separate(
    massive: Tensor, others: Tensor, allowed: float, processes: Processes
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Channel int32, low and high [MASSIVE_CHANNELS] for one block, from values [tokens, K/blocks].

    None if as many channels do not suffice: at most `allowed` other tokens may lie inside. If fewer suffice, the other
    intervals hold every finite value. Minima, maxima and counts are exact, so all processes get the same result.
    """
    channel = torch.zeros(MASSIVE_CHANNELS, dtype=torch.int32)
    low, high = torch.full((MASSIVE_CHANNELS,), -LARGEST), torch.full((MASSIVE_CHANNELS,), LARGEST)
    lowest, highest = (_extreme(massive, operation, processes) for operation in ("MIN", "MAX"))
    for index in range(MASSIVE_CHANNELS):
        inside, below, above = _nearest(others, lowest, highest, processes)
        # Among the channels with the fewest other tokens inside, the one with the widest margin relative to its spread.
        spread = (highest - lowest) + 1e-3 * torch.maximum(lowest.abs(), highest.abs()) + 1e-30
        margin = torch.where(inside == inside.min(), torch.minimum(below, above).clamp(max=LARGEST) / spread, -1.0)
        best = int(margin.argmax())
        channel[index] = best
        low[index] = (lowest[best] - ROOM * below[best]).clamp(min=-LARGEST)
        high[index] = (highest[best] + ROOM * above[best]).clamp(max=LARGEST)
        others = others[(others[:, best] >= low[index]) & (others[:, best] <= high[index])]
        if _count(others.shape[0], processes) <= allowed:
            return channel, low, high
    return None


def _nearest(others: Tensor, lowest: Tensor, highest: Tensor, processes: Processes) -> tuple[Tensor, Tensor, Tensor]:
    """Number of other values between `lowest` and `highest` of each channel, and distances of the nearest ones outside.

    The distances are those below and above, or infinite. A few channels at a time, since copies of all values would set
    the peak of memory.
    """
    infinity = torch.tensor(float("inf"), device=others.device)
    found = []
    for part, low, high in zip(*(value.split(CHANNELS, -1) for value in (others, lowest, highest)), strict=True):
        below = torch.where(part < low, low - part, infinity)
        above = torch.where(part > high, part - high, infinity)
        none = infinity.expand(1, part.shape[1])
        inside = ((part >= low) & (part <= high)).sum(0)
        found.append((inside, *(torch.cat((value, none)).amin(0) for value in (below, above))))
    inside, below, above = (torch.cat(parts) for parts in zip(*found, strict=True))
    return processes.all_reduce(inside, "SUM"), processes.all_reduce(below, "MIN"), processes.all_reduce(above, "MIN")


def holds(x: Tensor, intervals: MassiveIntervals) -> Tensor:
    """Whether the intervals recognize each token of x [tokens, K] as massive, bool [tokens]."""
    return is_massive(x, *(field.to(x.device) for field in intervals))
