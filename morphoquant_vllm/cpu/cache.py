"""The cache of built libraries: who may write there, and whether a file is what was put there.

A library that is loaded runs, and one that is cut short ends the process with SIGBUS. So each ends with the SHA-256 of
what comes before, which is read first. The loader passes over what stands behind the library.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from morphoquant_vllm import environment

logger = logging.getLogger("vllm.morphoquant_vllm.cpu.cache")

_MARK = b"morphoquant-sha256:"
_DIGEST_BYTES = hashlib.sha256().digest_size
# Nothing else may be written by, and others than these may not own what is loaded.
_ROOT = 0
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@contextmanager
def usable_directory(directory: Path) -> Iterator[Path]:
    """`directory` if only this user and root may write there, or if it is not there yet; else a private one, once."""
    if not directory.exists() or _is_private(directory.stat()):
        yield directory
        return
    logger.warning(
        "MorphoQuant: %s belongs to another user, or others may write there, so the CPU kernels are built anew at this "
        "start; `chmod go-w` it, or set %s to another directory",
        ascii(str(directory)),
        environment.CACHE,
    )
    # A loaded library stays loaded when its file is gone.
    with tempfile.TemporaryDirectory(prefix="morphoquant-") as private:
        yield Path(private)


def _is_private(status: os.stat_result) -> bool:
    """Whether this user or root owns a file or folder, and nobody else may write it."""
    return status.st_uid in (os.geteuid(), _ROOT) and not status.st_mode & _WRITABLE_BY_OTHERS


def put(made: Path, target: Path) -> None:
    """Move a new library to its place in one step, its digest at its end; what is there survives a loss of power."""
    digest = hashlib.sha256(made.read_bytes()).digest()
    made.chmod(stat.S_IRWXU)
    with made.open("ab") as file:
        file.write(_MARK + digest)
        file.flush()
        os.fsync(file.fileno())
    os.replace(made, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_intact(path: Path) -> bool:
    """Whether a file is there that `put` wrote: undamaged, and written by nobody but this user or root."""
    try:
        # Never waits for a writer, as opening a FIFO does.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _is_private(status):
            return False
        content = file.read()
    end = len(content) - len(_MARK) - _DIGEST_BYTES
    return end > 0 and content[end:] == _MARK + hashlib.sha256(content[:end]).digest()
