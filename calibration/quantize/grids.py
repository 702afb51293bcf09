"""Grids of one linear input: step and centre of each channel, and the rows of the checkpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.quantize import step_search
from calibration.quantize.chunks import zip_chunks
from calibration.quantize.massive_tokens import MassiveIntervals, MassiveTokens
from calibration.quantize.modality_rows import ModalityRow, RowChoice, RowTokens, choose_row, row_tokens
from calibration.quantize.observation import Observation
from calibration.quantize.reference_grid import reference_grid
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import activation, weights
from morphoquant_vllm.numerics.statistics import ChannelStatistics

# The step is searched on about this many tokens.
SEARCH_TOKENS = 2048


@dataclass(frozen=True)
class InputGrids:
    """The grid that serves any ordinary token, and the rows of modalities."""

    # Channels that may escape, bool [K].
    mask: Tensor
    grid: activation.Grid
    # By modality; empty if the recipe wants no modality-specific rows.
    modality_rows: dict[int, ModalityRow] = field(default_factory=dict)

    @property
    def separate(self) -> list[int]:
        """The modalities with a separate row."""
        return [row for row, found in self.modality_rows.items() if found.choice.own]


@dataclass(frozen=True)
class Evidence:
    """Statistics and values of the ordinary tokens of all processes, from which an input's grids are computed.

    Every process has the same.
    """

    # Statistics of every token that the common grid serves, and of every token that a modality's row would serve.
    pooled: ChannelStatistics
    by_modality: dict[int, ChannelStatistics]
    # Every n-th drawn token: values [searched, K], weights and modalities [searched]. None for the reference's grid.
    searched: tuple[Tensor, Tensor, Tensor] | None
    # By modality; empty if no modality can have a separate row.
    row_tokens: dict[int, RowTokens] = field(default_factory=dict)
    # Mask and grid by the authors' search.
    reference: tuple[Tensor, activation.Grid] | None = None


@dataclass(frozen=True)
class FoundInput:
    """The grids of one input, and its tensors in the checkpoint."""

    grids: InputGrids
    # The tensors of format.layers.INPUT_TENSORS, on the CPU, in natural channel order.
    tensors: dict[str, Tensor]


def find_input(
    observation: Observation,
    tokens: DrawnTokens,
    massive: MassiveTokens,
    matrix: Tensor,
    spec: QuantizationSpec,
    recipe: Recipe,
    *,
    full_mask: bool,
) -> FoundInput:
    """Grids and channel order of the input of the weights `matrix` [N, K], the same in all processes.

    With `full_mask`, every channel may escape in the reference's grid.
    """
    evidence = gather_evidence(observation, tokens, massive.local, recipe, len(spec.rows) - 1, full_mask=full_mask)
    massive_x = tokens.all_gather(observation.drawn, tokens.all_gather(massive.local).nonzero().flatten())

    def find() -> FoundInput:
        grids = find_grids(evidence, matrix, recipe)
        absorbed = weights.absorb(matrix, grids.grid.step).cpu()
        order = weights.channel_order(absorbed, massive.intervals.channel.shape[0])
        return FoundInput(
            grids, input_tensors(massive_x, grids, order, massive.intervals, len(spec.rows), spec.any_row)
        )

    return tokens.processes.broadcast(find, (FoundInput, InputGrids, activation.Grid, ModalityRow, RowChoice))


def gather_evidence(
    observation: Observation, tokens: DrawnTokens, massive: Tensor, recipe: Recipe, massive_row: int, *, full_mask: bool
) -> Evidence:
    """The evidence for an input's grids, on the device of the observed tokens.

    `observation` and massive, bool [local drawn], are of this process's drawn tokens.
    """
    x = observation.drawn
    # Which of all drawn tokens are ordinary.
    all_massive = tokens.all_gather(massive).cpu()
    ordinary = (~all_massive).nonzero().flatten()
    by_modality = {row: statistics for row, statistics in observation.statistics.items() if row != massive_row}
    # If no intervals recognize massive tokens, this grid serves them too.
    recognized_by_none = (
        [] if bool(all_massive.any()) else [s for r, s in observation.statistics.items() if r == massive_row]
    )
    pooled = reduce(ChannelStatistics.merge, [*by_modality.values(), *recognized_by_none])
    if recipe.grid == "reference":
        local = (~massive).nonzero().flatten()
        parts = zip_chunks(x[local], tokens.local(tokens.weight).to(x.device)[local])
        found = reference_grid(
            list(by_modality.values()), pooled, parts, recipe, full_mask=full_mask, processes=tokens.processes
        )
        return Evidence(pooled, by_modality, None, reference=found)
    weight, modality = (value[ordinary].to(x.device) for value in (tokens.weight, tokens.modality))
    # Every n-th token, so each modality keeps the share that its weights give it.
    stride = max(1, ordinary.numel() // SEARCH_TOKENS)
    searched = tokens.all_gather(x, ordinary[::stride]), weight[::stride] / weight[::stride].sum(), modality[::stride]
    present = modality.unique().tolist()
    if not recipe.modality_rows or len(present) < 2:
        return Evidence(pooled, by_modality, searched)
    reach, rows = {}, {}
    for row in present:
        reach[row] = reduce(ChannelStatistics.merge, [by_modality[row], *recognized_by_none])
        chosen = ordinary[modality.cpu() == row]
        rows[row] = RowTokens(chosen.numel(), *(tokens.all_gather(x, part) for part in row_tokens(chosen)))
    return Evidence(pooled, reach, searched, rows)


def find_grids(evidence: Evidence, matrix: Tensor, recipe: Recipe) -> InputGrids:
    """Grids of one input's ordinary tokens; matrix [N, K] on their device."""
    if evidence.reference is not None:
        return InputGrids(*evidence.reference)
    assert evidence.searched is not None
    part, part_weight, modality = evidence.searched
    grid = step_search.budget_grid(
        zip_chunks(part, part_weight, _modality_shares(modality, part_weight)),
        step_search.centres(part),
        evidence.pooled.minimum,
        evidence.pooled.maximum,
        matrix.square().sum(0),
        recipe.escape_budget,
    )
    mask = torch.full_like(grid.step, recipe.escape_budget > 0, dtype=torch.bool)
    rows = {}
    for row, found in evidence.row_tokens.items():
        reach = evidence.by_modality[row]
        rows[row] = choose_row(
            found, reach.minimum, reach.maximum, grid, mask, matrix, recipe.escape_budget, recipe.row_margin
        )
    return InputGrids(mask, grid, rows)


def _modality_shares(modality: Tensor, weight: Tensor) -> Tensor:
    """Share of each token in the mean over its modality's tokens, float32 [searched, modalities]; else 0."""
    columns = [torch.where(modality == row, weight, 0.0) for row in modality.unique()]
    return torch.stack([column / column.sum() for column in columns], 1)


def input_tensors(
    massive: Tensor, grids: InputGrids, order: Tensor, intervals: MassiveIntervals, rows: int, any_row: int
) -> dict[str, Tensor]:
    """The checkpoint's tensors of one input (format.layers.INPUT_TENSORS), on the CPU; massive is [tokens, K]."""
    grid, mask = grids.grid, grids.mask
    centre, gain = grid.centre.expand(rows, -1).clone(), torch.ones(rows)
    for row in grids.separate:
        centre[row], gain[row] = grids.modality_rows[row].centre, grids.modality_rows[row].choice.gain
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
