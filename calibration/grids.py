"""Grids of one linear input: step and centre of each channel, and what each row of the checkpoint has. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from calibration import steps
from calibration.chunks import together
from calibration.collect import Observation
from calibration.massive import MassiveIntervals
from calibration.recipe import Recipe
from calibration.reference_grid import reference_grid
from calibration.rows import ModalityRow, choose_row
from morphoquant_vllm.numerics import activation
from morphoquant_vllm.numerics.statistics import ChannelStatistics

# The step is searched on about this many tokens.
SEARCH_TOKENS = 2048


@dataclass(frozen=True)
class InputGrids:
    """The grid that serves any ordinary token, and the rows of modalities."""

    # Channels that may escape, bool [K].
    mask: Tensor
    grid: activation.Grid
    # By modality, where rows of their own were asked for.
    rows: dict[int, ModalityRow] = field(default_factory=dict)

    @property
    def own(self) -> list[int]:
        """The modalities that a row of their own serves."""
        return [row for row, found in self.rows.items() if found.choice.own]


def find_grids(
    observation: Observation,
    modality: Tensor,
    massive: Tensor,
    weight: Tensor,
    massive_row: int,
    matrix: Tensor,
    recipe: Recipe,
    *,
    full_mask: bool,
) -> InputGrids:
    """Grids of one input's ordinary tokens, on the device of the sample.

    modality int [T], massive bool [T] and weight float32 [T] are those of the sampled tokens; matrix [N, K].
    """
    ordinary = (~massive).nonzero().flatten()
    sample, weight, modality = observation.sample[ordinary], weight[ordinary], modality[ordinary]
    by_modality = {row: statistics for row, statistics in observation.statistics.items() if row != massive_row}
    # Where no interval tells massive tokens, this grid serves them too.
    together_with = [] if bool(massive.any()) else [s for r, s in observation.statistics.items() if r == massive_row]
    pooled = reduce(ChannelStatistics.merge, [*by_modality.values(), *together_with])
    if recipe.grid == "reference":
        parts = together(sample, weight)
        return InputGrids(*reference_grid(list(by_modality.values()), pooled, parts, recipe, full_mask=full_mask))
    # Every n-th token: a modality's share stays what its weights make it.
    stride = max(1, sample.shape[0] // SEARCH_TOKENS)
    part, part_weight = sample[::stride], weight[::stride] / weight[::stride].sum()
    grid = steps.budget_grid(
        together(part, part_weight, _modality_shares(modality[::stride], part_weight)),
        steps.centres(part),
        pooled.minimum,
        pooled.maximum,
        matrix.square().sum(0),
        recipe.escape_budget,
    )
    mask = torch.full_like(grid.step, recipe.escape_budget > 0, dtype=torch.bool)
    present = modality.unique().tolist()
    if not recipe.modality_rows or len(present) < 2:
        return InputGrids(mask, grid)
    rows = {}
    for row in present:
        reach = reduce(ChannelStatistics.merge, [by_modality[row], *together_with])
        own = sample[modality == row]
        rows[row] = choose_row(
            own, reach.minimum, reach.maximum, grid, mask, matrix, recipe.escape_budget, recipe.row_margin
        )
    return InputGrids(mask, grid, rows)


def _modality_shares(modality: Tensor, weight: Tensor) -> Tensor:
    """Part of each token in the mean over its own modality's, float32 [T, modalities]."""
    columns = [torch.where(modality == row, weight, 0.0) for row in modality.unique()]
    return torch.stack([column / column.sum() for column in columns], 1)


def input_tensors(
    massive: Tensor, grids: InputGrids, order: Tensor, intervals: MassiveIntervals, rows: int, any_row: int
) -> dict[str, Tensor]:
    """The checkpoint's tensors of one input (schema.INPUT_TENSORS), on the CPU; massive [T, K]: the massive tokens."""
    grid, mask = grids.grid, grids.mask
    centre, gain = grid.centre.expand(rows, -1).clone(), torch.ones(rows)
    for row in grids.own:
        centre[row], gain[row] = grids.rows[row].centre, grids.rows[row].choice.gain
    if massive.shape[0]:
        centre[-1] = massive.mean(0)
        farthest = float(((massive - centre[-1]).abs() / grid.step).max())
        gain[-1] = max(1.0, farthest / activation.GUARD_CODES)
    return {
        "activation_step": grid.step.cpu(),
        "channel_order": order.cpu(),
        # Every channel of a massive token may escape: there are few such tokens, and all others attend to them.
        "modality_mask": torch.cat((mask.expand(rows - 1, -1), torch.ones_like(mask)[None])).cpu(),
        "centre": centre.cpu(),
        "gain": gain,
        "massive_channel": intervals.channel.cpu(),
        "massive_low": intervals.low.cpu(),
        "massive_high": intervals.high.cpu(),
    }
