"""Giving freed memory back to the system while a model is loaded on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function, or None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed_memory() -> None:
    """Return the pages of what was freed inside the heap.

    glibc keeps them: tensors below 32 MB lie in its heap, and canonical tensors that were freed between repacked ones
    would stay resident as holes (1.45 times the checkpoint was seen instead of 1.05).
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
