"""The scales that a group of weights may have: bfloat16 numbers, or levels times a channel scale. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calibration.quantize.scale_fit import fit_levels, fit_scales

# Scales that are tried, as multiples of the current one: far ones in the first search of codes, near ones later.
FAR_RATIOS = (0.85, 0.92, 1.0, 1.08, 1.16)
NEAR_RATIOS = (0.95, 1.0, 1.05)
# The same for levels: how many on either side of the nearest one are tried.
FAR_LEVELS, NEAR_LEVELS = 2, 1


class AllowedScales(Protocol):
    """The set of allowed scales, and their fit to codes. Scales are float32 throughout."""

    def of_outputs(self, outputs: slice) -> AllowedScales:
        """The scales allowed for some of the output channels."""

    def candidates(self, scale: Tensor, *, far: bool) -> Tensor:
        """Allowed scales around `scale` [..., N]: float32 [candidates, ..., N], not negative; some may be equal."""

    def fitted(self, aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, AllowedScales]:
        """Scales [N, K/G] of less loss for codes [N, K], and the scales allowed from now on; see `scale_fit`."""


@dataclass(frozen=True)
class FreeScales:
    """Every positive bfloat16 number is allowed."""

    def of_outputs(self, outputs: slice) -> FreeScales:
        return self

    def candidates(self, scale: Tensor, *, far: bool) -> Tensor:
        ratios = scale.new_tensor(FAR_RATIOS if far else NEAR_RATIOS)
        return (scale * ratios.view(-1, *[1] * scale.dim())).bfloat16().float()

    def fitted(self, aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, FreeScales]:
        return fit_scales(aimed, damped, codes, scale).bfloat16().float(), self


@dataclass(frozen=True)
class LevelScales:
    """Products level * channel_scale are allowed, as float32 computes them; levels are 1 to `levels`."""

    channel_scale: Tensor  # float32 [N]
    levels: int

    def of_outputs(self, outputs: slice) -> LevelScales:
        return LevelScales(self.channel_scale[outputs], self.levels)

    def level(self, scale: Tensor) -> Tensor:
        """The nearest levels of scales [..., N], as floats. Gives back the level of an allowed scale."""
        # The errors of division and product are at most 2^-24 of the level, so rounding gives the whole number.
        return (scale / self.channel_scale).round().clamp(1, self.levels)

    def candidates(self, scale: Tensor, *, far: bool) -> Tensor:
        reach = FAR_LEVELS if far else NEAR_LEVELS
        steps = torch.arange(-reach, reach + 1, device=scale.device).view(-1, *[1] * scale.dim())
        return (self.level(scale) + steps).clamp(1, self.levels) * self.channel_scale

    def fitted(self, aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, LevelScales]:
        level, channel_scale = fit_levels(aimed, damped, codes, self.level(scale.T).T, self.channel_scale, self.levels)
        return level * channel_scale[:, None], LevelScales(channel_scale, self.levels)
