"""Memory on a CPU: large records in large pages, and the return of freed memory to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# Records of this many bytes or more get a separate mapping. It is one large page of x86.
LARGE = 2 << 20


def zero_bytes(count: int) -> Tensor:
    """`count` bytes of zeros, uint8 [count], in large pages if the system grants them.

    Weights are read from the first to the last byte for every token. With pages of 4 KiB the processor's prefetcher
    stops at the end of each page. The kernel aligns mappings of this size to large pages and uses small pages for the
    rest, so the size is not rounded up.
    """
    if count < LARGE:
        return torch.zeros(count, dtype=torch.uint8)
    # Private: Python's default is shared memory, whose large pages have a separate switch that is mostly off.
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        # A kernel without transparent large pages refuses; the small pages remain.
        with contextlib.suppress(OSError):
            pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


def move_to_large_pages(parameter: torch.nn.Parameter) -> None:
    """Move a large `parameter` on the CPU to memory of `zero_bytes` before it is loaded; small ones stay."""
    data = parameter.data
    size = data.numel() * data.element_size()
    if data.device.type == "cpu" and size >= LARGE:
        parameter.data = zero_bytes(size).view(data.dtype).view(data.shape)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function, or None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed_memory() -> None:
    """Return freed pages inside the heap to the system.

    glibc keeps them: tensors below 32 MB lie in its heap, and memory freed between live tensors stays resident. While
    vLLM loads, these are canonical tensors between repacked ones: 1.45 times the checkpoint was seen instead of 1.05.
    In calibration, these are the tensors of forward passes and collectors.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
