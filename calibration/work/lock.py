"""Locks a work directory for one run at a time. The system releases the lock when its holder dies, for any reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from morphoquant_vllm.errors import MorphoQuantError

LOCK_FILE = "lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold an existing work directory by flock on a file in it; MorphoQuantError if another run holds it."""
    lock = FileLock(directory / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MorphoQuantError(
            f"{directory}: another calibration uses this work directory; wait for its end, or choose another --work"
        ) from error
    try:
        yield
    finally:
        lock.release()
