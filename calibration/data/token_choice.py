"""Chooses the tokens of the search and their weights: the same for the same seed, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from calibration.processes import ONE, Processes
from morphoquant_vllm.errors import MorphoQuantError

# The drawn tokens of a modality come from so many samples or more.
LEAST_SAMPLES = 16


@dataclass(frozen=True)
class DrawnTokens:
    """T tokens chosen from all samples; their activations are kept in this order, sample after sample.

    Every process has the whole choice, and holds the activations of its local tokens, those of its samples.
    """

    # Positions in each sample, ascending, int64.
    positions: tuple[Tensor, ...]
    # Modality row of each chosen token, int32 [drawn].
    modality: Tensor
    # Weight of each chosen token in a weighted mean, float32 [drawn], sums to 1.
    weight: Tensor
    # Tokens of each row in all samples, by row index: present rows only.
    counts: dict[int, int]
    processes: Processes = ONE
    # Rank of the process of each sample; empty if one process has all samples.
    owners: tuple[int, ...] = ()

    def spread(self, processes: Processes, owners: Sequence[int]) -> DrawnTokens:
        """The same tokens, with the samples divided among processes: `owners` is the rank of each sample."""
        return replace(self, processes=processes, owners=tuple(owners))

    def part(self, chosen: Tensor, weight: Tensor, counts: Mapping[int, int]) -> DrawnTokens:
        """The tokens at the places `chosen`, int64, ascending, with a new weight of each, and counts of rows."""
        kept = torch.zeros(self.modality.numel(), dtype=torch.bool)
        kept[chosen] = True
        lengths = [positions.numel() for positions in self.positions]
        parts = zip(self.positions, kept.split(lengths), strict=True)
        return replace(
            self,
            positions=tuple(positions[own] for positions, own in parts),
            modality=self.modality[chosen],
            weight=weight / weight.sum(),
            counts=dict(counts),
        )

    def local_places(self, chosen: Tensor) -> Tensor:
        """Places of the tokens `chosen`, int64 ascending, in this process's values: int64."""
        if self.processes.size == 1:
            return chosen
        local = self.token_owners == self.processes.rank
        return (local.cumsum(0) - 1)[chosen[local[chosen]]]

    @property
    def samples(self) -> list[int]:
        """Indices of this process's samples."""
        if self.processes.size == 1:
            return list(range(len(self.positions)))
        return [index for index, owner in enumerate(self.owners) if owner == self.processes.rank]

    @property
    def token_owners(self) -> Tensor:
        """Rank of the process of each token, int64 [drawn]."""
        lengths = torch.tensor([positions.numel() for positions in self.positions])
        owners = torch.tensor(self.owners or (0,) * len(self.positions))
        return owners.repeat_interleave(lengths)

    def local(self, value: Tensor) -> Tensor:
        """The entries of `value` [drawn, ...], on the CPU, of this process's tokens: [local drawn, ...]."""
        return value if self.processes.size == 1 else value[self.token_owners == self.processes.rank]

    def every(self, value: Tensor, stride: int) -> Tensor:
        """Subsample to every `stride`-th token overall and keep this process's; `value` is [local drawn, ...]."""
        if self.processes.size == 1:
            return value[::stride]
        chosen = (self.token_owners == self.processes.rank).nonzero().flatten() % stride == 0
        return value[chosen.to(value.device)]

    def all_gather(self, value: Tensor, wanted: Tensor | None = None) -> Tensor:
        """All processes' values of the tokens `wanted` (indices int64, None: all), from value [local drawn, ...]."""
        if self.processes.size == 1:
            return value if wanted is None else value[wanted.to(value.device)]
        owners = self.token_owners
        if wanted is None:
            return self.processes.all_gather_rows(value, owners)
        wanted = wanted.cpu()
        local = owners == self.processes.rank
        places = (local.cumsum(0) - 1)[wanted[local[wanted]]]
        return self.processes.all_gather_rows(value[places.to(value.device)], owners[wanted])


def water_fill(counts: Mapping[int, int], budget: int) -> dict[int, int]:
    """Divide `budget` among rows: small counts are taken whole, and the large ones share the rest evenly."""
    quota = {}
    remaining = dict(sorted(counts.items(), key=lambda item: (item[1], item[0])))
    while remaining:
        row = next(iter(remaining))
        # The smallest comes first: its unused budget goes to the larger ones, and the last gets the remainder.
        quota[row] = min(remaining.pop(row), budget // (len(remaining) + 1))
        budget -= quota[row]
    return dict(sorted(quota.items()))


def modality_shares(counts: Mapping[int, int], balance: float) -> dict[int, float]:
    """Share of each row in a weighted mean, proportional to count ** (1 - balance); the shares sum to 1."""
    raw = {row: float(count) ** (1.0 - balance) for row, count in counts.items()}
    total = sum(raw.values())
    return {row: share / total for row, share in raw.items()}


def choose_tokens(modalities: Sequence[Tensor], budget: int, balance: float, seed: int) -> DrawnTokens:
    """Draw at most `budget` tokens from the samples' modality ids (each int [tokens]), evenly over the rows present.

    Samples are taken in random order, most of them whole. The first token of every sample is added, because it is
    unlike all others. A token of row r has the weight modality_shares[r] / (chosen tokens of r), so the number drawn
    does not change a modality's total weight.
    """
    flat = torch.cat([ids.flatten().to("cpu", torch.int64) for ids in modalities]) if modalities else torch.empty(0)
    if not flat.numel():
        raise MorphoQuantError("the calibration data has no tokens; give more data")
    counts = {int(row): int(count) for row, count in zip(*flat.unique(return_counts=True), strict=True)}
    quota = water_fill(counts, max(budget, len(counts)))
    shares = modality_shares(counts, balance)
    generator = torch.Generator().manual_seed(seed)
    lengths = [ids.numel() for ids in modalities]
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[starts[torch.tensor(lengths) > 0]] = True
    weight = torch.zeros(flat.numel(), dtype=torch.float64)
    order = _spread_order(len(lengths), generator)
    for row, size in quota.items():
        candidates = [part.nonzero().flatten() for part in (flat == row).split(lengths)]
        chosen[_draw([starts[place] + candidates[place] for place in order], size, generator)] = True
        drawn = chosen & (flat == row)
        weight[drawn] = shares[row] / int(drawn.sum())
    return DrawnTokens(
        positions=tuple(part.nonzero().flatten() for part in chosen.split(lengths)),
        modality=flat[chosen].int(),
        weight=weight[chosen].float(),
        counts=counts,
    )


def _spread_order(count: int, generator: torch.Generator) -> list[int]:
    """The indices of `count` samples in random order, so that LEAST_SAMPLES in a row differ in index % LEAST_SAMPLES.

    Samples are held out by their index (quantize.held_out). So a part of those that are drawn can be held out, too.
    """
    mixed = torch.randperm(count, generator=generator)
    classes = (mixed[mixed % LEAST_SAMPLES == place].tolist() for place in range(LEAST_SAMPLES))
    return [index for turn in zip_longest(*classes) for index in turn if index is not None]


def _draw(candidates: Sequence[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """`size` of the samples' candidates, int64, or all: one sample after the other gives its own, up to a limit.

    A token whose context is not drawn brings errors that no fit has seen. Fits to such tokens were worse on new text.
    So some samples are drawn whole, not some tokens of each. Long ones, of which too few would fit in, give random
    tokens. The limits rise if all samples together are too short.
    """
    limit = max(1, size // LEAST_SAMPLES)
    parts = [
        own if own.numel() <= limit else own[torch.randperm(own.numel(), generator=generator)] for own in candidates
    ]
    # Cut first: with a small limit, long samples would fall into very many pieces.
    rounds = zip_longest(*(part[:size].split(limit) for part in parts), fillvalue=torch.zeros(0, dtype=torch.int64))
    return torch.cat([piece for pieces in rounds for piece in pieces])[:size]


def share_tokens(
    processes: Processes, modalities: Mapping[int, Tensor], budget: int, balance: float, seed: int
) -> DrawnTokens:
    """Run `choose_tokens` on the samples of all processes; `modalities` holds this process's ids, by sample index."""
    samples = sorted(
        (place, rank, ids)
        for rank, ids_of_rank in enumerate(processes.all_gather(dict(modalities)))
        for place, ids in ids_of_rank.items()
    )
    tokens = choose_tokens([ids for _, _, ids in samples], budget, balance, seed)
    return tokens.spread(processes, [rank for _, rank, _ in samples])
