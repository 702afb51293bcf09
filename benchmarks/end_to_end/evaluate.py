"""Perplexity of a model on windows of several texts, and its ratio to another model's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.learn import last_states
from benchmarks.end_to_end.student import StudentInput

# By text: summed negative log probability of every token but the first, for each window.
Losses = dict[str, list[float]]


@torch.no_grad()
def losses(model: Any, texts: Mapping[str, Sequence[Sequence[int]]]) -> Losses:
    """The losses of a causal model on the windows of each text."""
    head: Tensor = model.get_output_embeddings().weight
    found: Losses = {name: [] for name in texts}
    for name, windows in texts.items():
        for window in windows:
            logits = last_states(model, window)[:-1] @ head.T
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
            found[name].append(float(loss))
    return found


def perplexities(found: Losses, tokens: int) -> dict[str, float]:
    """The perplexity of each text, of windows of `tokens` tokens."""
    return {name: math.exp(statistics.mean(values) / (tokens - 1)) for name, values in found.items()}


def ratio(found: Losses, other: Losses, tokens: int) -> tuple[float, float]:
    """The perplexity on all windows together over that of `other`, and its standard error over windows."""
    pairs = [pair for name in found for pair in zip(found[name], other[name], strict=True)]
    differences = [(own - others) / (tokens - 1) for own, others in pairs]
    value = math.exp(statistics.mean(differences))
    return value, value * statistics.stdev(differences) / math.sqrt(len(differences))


def escape_rate(inputs: Sequence[StudentInput]) -> float:
    """Codes outside 4 bits as a share of all codes since the inputs were told to forget."""
    return sum(given.escaped for given in inputs) / sum(given.counted for given in inputs)
