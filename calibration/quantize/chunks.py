"""Runs of tokens that are worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Elements of a chunk of tokens: on a CPU few enough to stay near the cache, and enough that waiting for each other at
# the end of every operation costs the threads little on a busy machine; on a GPU enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


def chunks(value: Tensor, columns: int | None = None) -> Iterator[Tensor]:
    """Runs of tokens of `value` [T, K], or of [T] or [T, anything] that goes with `columns` = K."""
    limit = CHUNK_ELEMENTS.get(value.device.type, CHUNK_ELEMENTS["cpu"])
    return iter(value.split(max(1, limit // (columns or value.shape[1]))))


def together(first: Tensor, *others: Tensor) -> Iterator[Any]:
    """The same runs of tokens of several tensors [T, ...]; the first, [T, K], sets their length."""
    return zip(chunks(first), *(chunks(other, first.shape[1]) for other in others), strict=True)
