"""The cache of built libraries: checks of write permissions and of damaged files.

Loading a library runs it, and a truncated one ends the process with SIGBUS. So each file ends with the SHA-256 of the
bytes before it, which is checked first. The loader ignores bytes after the library.
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
# User id of root: only this user and root may own or write a library that is loaded.
_ROOT = 0
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@contextmanager
def usable_directory(directory: Path) -> Iterator[Path]:
    """`directory` if it does not exist yet or only this user and root may write there; else a temporary private one."""
    if not directory.exists() or _is_private(directory.stat()):
        yield directory
        return
    logger.warning(
        "MorphoQuant: %s belongs to another user, or others may write there, so the CPU kernels are built anew at this "
        "start; `chmod go-w` it, or set %s to another directory",
        ascii(str(directory)),
        environment.CACHE,
    )
    # A loaded library stays loaded after its file is removed.
    with tempfile.TemporaryDirectory(prefix="morphoquant-") as private:
        yield Path(private)


def _is_private(status: os.stat_result) -> bool:
    """Whether this user or root owns a file or folder, and no other user may write it."""
    return status.st_uid in (os.geteuid(), _ROOT) and not status.st_mode & _WRITABLE_BY_OTHERS


def put(made: Path, target: Path) -> None:
    """Append the digest to a new library and move it to `target` in one step; `target` survives a power failure."""
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
    """Whether `path` is a file that `put` wrote: undamaged, and writable only by this user and root."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer.
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
