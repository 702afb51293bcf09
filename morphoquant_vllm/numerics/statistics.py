"""Per-channel activation statistics and the reduction that merges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# The reduction of each field of ChannelStatistics, over batches and over ranks. The names are those of
# torch.distributed.ReduceOp.
REDUCTIONS = {
    "minimum": "MIN",
    "maximum": "MAX",
    "abs_sum": "SUM",
    "sum": "SUM",
    "square_sum": "SUM",
    "count": "SUM",
}
_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"MIN": torch.minimum, "MAX": torch.maximum, "SUM": torch.add}


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of one activation over tokens: each float32 [K], and the number of tokens as a float64 scalar."""

    minimum: Tensor
    maximum: Tensor
    abs_sum: Tensor
    sum: Tensor
    square_sum: Tensor
    count: Tensor

    @staticmethod
    def empty(in_features: int) -> ChannelStatistics:
        """Statistics of no token: the neutral element of `merge`."""
        zeros = torch.zeros(in_features)
        infinite = torch.full((in_features,), float("inf"))
        count = torch.zeros((), dtype=torch.float64)
        return ChannelStatistics(infinite, -infinite, zeros, zeros, zeros, count)

    @staticmethod
    def of(x: Tensor) -> ChannelStatistics:
        """Statistics of `x` [M, K] (any float dtype), computed in float32; of no token if M is 0."""
        if x.dim() != 2:
            raise ValueError(f"statistics need x as [M, K], got shape {list(x.shape)}")
        if x.shape[0] == 0:
            return ChannelStatistics.empty(x.shape[1])
        x = x.float()
        return ChannelStatistics(
            minimum=x.amin(0),
            maximum=x.amax(0),
            abs_sum=x.abs().sum(0),
            sum=x.sum(0),
            square_sum=x.square().sum(0),
            count=torch.tensor(float(x.shape[0]), dtype=torch.float64),
        )

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Statistics of both sets of tokens together."""
        return ChannelStatistics(
            **{
                field.name: _MERGE[REDUCTIONS[field.name]](getattr(self, field.name), getattr(other, field.name))
                for field in fields(self)
            }
        )

    @property
    def abs_mean(self) -> Tensor:
        """Mean magnitude per channel, float32 [K]; 0 if no token was seen."""
        return self.abs_sum / self.count.clamp(min=1).float()

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return int(self.count)
