"""Runs of tokens that are processed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Elements of a chunk of tokens. On a CPU a chunk should stay near the cache. It should also be large, since threads
# wait for each other after every operation, which takes long on a busy machine. On a GPU it fills the device.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


def chunks(value: Tensor, columns: int | None = None) -> Iterator[Tensor]:
    """Runs of tokens of `value` [tokens, K], or of [tokens] or [tokens, anything] that goes with `columns` = K."""
    limit = CHUNK_ELEMENTS.get(value.device.type, CHUNK_ELEMENTS["cpu"])
    return iter(value.split(max(1, limit // (columns or value.shape[1]))))


def zip_chunks(first: Tensor, *others: Tensor) -> Iterator[Any]:
    """The same runs of tokens of several tensors [tokens, ...]; the first tensor, [tokens, K], sets their length."""
    return zip(chunks(first), *(chunks(other, first.shape[1]) for other in others), strict=True)
