"""Memory on a CPU: large records in large pages, and what was freed given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# From this size on a record gets a mapping of its own: one large page of x86 (bytes).
LARGE = 2 << 20


def zero_bytes(count: int) -> Tensor:
    """`count` bytes of zeros, uint8 [count], in large pages where the system gives them on request.

    Weights are read from the first to the last byte for every token. With pages of 4 KiB the processor's own fetching
    stops at each page's end. The kernel places mappings of this size at
    large pages' boundaries and takes small pages for the rest, so that nothing is rounded up.
    """
    if count < LARGE:
        return torch.zeros(count, dtype=torch.uint8)
    # Private: Python's default is shared memory, for which large pages have a switch of their own, mostly off.
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        # A kernel without transparent large pages refuses: small ones serve.
        with contextlib.suppress(OSError):
            pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


def move_to_large_pages(parameter: torch.nn.Parameter) -> None:
    """Give a parameter on the CPU, not yet loaded, memory as `zero_bytes` makes it; small ones stay where they are."""
    data = parameter.data
    size = data.numel() * data.element_size()
    if data.device.type == "cpu" and size >= LARGE:
        parameter.data = zero_bytes(size).view(data.dtype).view(data.shape)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function, or None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed_memory() -> None:
    """Return the pages of what was freed inside the heap.

    glibc keeps them: tensors below 32 MB lie in its heap, and what was freed between others stays resident as holes:
    canonical tensors between repacked ones (1.45 times the checkpoint was seen instead of 1.05), and in calibration
    what forwards and collectors had.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
