"""One run at a time on a work directory: a lock that the system takes back when its holder dies, however it dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from morphoquant_vllm.errors import MorphoQuantError

LOCK_FILE = "lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold an existing work directory (flock on a file in it); MorphoQuantError where another run holds it."""
    lock = FileLock(directory / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MorphoQuantError(
            f"{directory}: another calibration is at work there; wait for it to end, or choose another --work"
        ) from error
    try:
        yield
    finally:
        lock.release()
