"""Which tokens the search looks at, and how much each counts. Pure, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError


@dataclass(frozen=True)
class TokenSample:
    """T tokens chosen from all samples; their activations are kept in this order, sample after sample."""

    # Positions in each sample, ascending, int64.
    positions: tuple[Tensor, ...]
    # Modality row of each chosen token, int32 [T].
    modality: Tensor
    # What each chosen token counts in a weighted mean, float32 [T], sums to 1.
    weight: Tensor
    # Tokens of each row in all samples, by row index: present rows only.
    counts: dict[int, int]


def water_fill(counts: Mapping[int, int], budget: int) -> dict[int, int]:
    """Share `budget` out so that small counts are taken whole and the rest is split evenly among the large."""
    quota = {}
    remaining = dict(sorted(counts.items(), key=lambda item: (item[1], item[0])))
    while remaining:
        row = next(iter(remaining))
        # The smallest first: what it leaves over goes to the larger ones; the last gets all that is left.
        quota[row] = min(remaining.pop(row), budget // (len(remaining) + 1))
        budget -= quota[row]
    return dict(sorted(quota.items()))


def modality_shares(counts: Mapping[int, int], balance: float) -> dict[int, float]:
    """Share of each row in a weighted mean, proportional to count ** (1 - balance); the shares sum to 1."""
    raw = {row: float(count) ** (1.0 - balance) for row, count in counts.items()}
    total = sum(raw.values())
    return {row: share / total for row, share in raw.items()}


def choose_tokens(modalities: Sequence[Tensor], budget: int, balance: float, seed: int) -> TokenSample:
    """Draw at most `budget` tokens from the samples' modality ids (each int [tokens]), evenly over the rows present.

    The first token of every sample is taken besides: it is unlike all others. A token of row r weighs
    modality_shares[r] / (chosen tokens of r): how many were drawn does not change what a modality counts.
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
    for row, size in quota.items():
        candidates = (flat == row).nonzero().flatten()
        chosen[candidates[torch.randperm(candidates.numel(), generator=generator)[:size]]] = True
        drawn = chosen & (flat == row)
        weight[drawn] = shares[row] / int(drawn.sum())
    return TokenSample(
        positions=tuple(part.nonzero().flatten() for part in chosen.split(lengths)),
        modality=flat[chosen].int(),
        weight=weight[chosen].float(),
        counts=counts,
    )
