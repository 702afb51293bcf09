"""The threshold of a mask that is one number for the whole network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.files import write_atomically
from benchmarks.models import decoder
from morphoquant_vllm.numerics.reference import dispersion_score
from morphoquant_vllm.numerics.statistics import ChannelStatistics


def network_threshold(dispersions: Sequence[Tensor], tau: float) -> float:
    """`tau` standard deviations above the mean dispersion of all channels of all inputs, each [K]."""
    pooled = torch.cat(list(dispersions))
    return float(pooled.mean() + tau * pooled.std())


def input_dispersions(
    model: Path, data: Sequence[Path], window_tokens: int, max_samples: int, full_mask: str
) -> list[Tensor]:
    """Dispersion [K] of every linear input of the 16-bit model on its calibration samples.

    Inputs of linears named `*full_mask` have no threshold and are left out. So is the first token of
    each sample: the massive row takes it.
    """
    loaded = decoder.load(model)
    blocks = decoder.blocks_of(loaded, model)
    entries = decoder.capture(loaded, blocks, decoder.calibration_inputs(model, data, window_tokens, max_samples))
    found = []
    for index, block in enumerate(blocks):
        groups, outputs = decoder.observe(block, index, entries)
        for group in groups:
            if not group.names[0].endswith(full_mask):
                found.append(dispersion_score(ChannelStatistics.of(torch.cat([x[1:] for x in group.inputs]))))
        for entry, hidden in zip(entries, outputs, strict=True):
            entry.hidden = hidden
    return found


def write_threshold(path: Path, value: float) -> None:
    """Keep a threshold."""
    write_atomically(path, json.dumps(value) + "\n")


def read_threshold(path: Path) -> float | None:
    """A kept threshold, or None."""
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
