"""The cache of built libraries: checks of write permissions and of damaged files, and one build at a time.

Loading a library runs it, and a truncated one ends the process with SIGBUS. So each file ends with the SHA-256 of the
bytes before it, which is checked first. The loader ignores bytes after the library.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import logging
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from morphoquant_vllm import environment

logger = logging.getLogger("vllm.morphoquant_vllm.cpu.cache")

_MARK = b"morphoquant-sha256:"
_DIGEST_BYTES = hashlib.sha256().digest_size
# User id of root: only this user and root may own or write a library that is loaded.
_ROOT = 0
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Folders of a build, in the cache and in the system's folder of temporary files.
_SCRATCH, _PRIVATE = "build-", "morphoquant-kernels-"
# Seconds after which such a folder is left by a build that was killed, if no lock says so.
_LEFT_AFTER = 3600
_POLL_SECONDS = 0.1


@contextmanager
def usable_directory(directory: Path) -> Iterator[Path]:
    """`directory`, made if it is missing, if only this user and root may write there; else a temporary private one.

    A directory that cannot be made is returned as it is: building there names the reason.
    """
    # Not Path.resolve, which raises for a loop of links.
    directory = Path(os.path.realpath(directory))
    _make(directory)
    reason = _refusal(directory) if os.path.exists(directory) else None
    if reason is None:
        yield directory
        return
    logger.warning("MorphoQuant: %s set %s to another directory", reason, environment.CACHE)
    _remove_leftovers(Path(tempfile.gettempdir()), _PRIVATE, _LEFT_AFTER)
    # A loaded library stays loaded after its file is removed.
    with tempfile.TemporaryDirectory(prefix=_PRIVATE) as private:
        yield Path(private)


def _refusal(directory: Path) -> str | None:
    """Why libraries are not kept in an existing directory, up to the words on another one; None if they are."""
    unsafe = writable_by_others(directory)
    if unsafe is not None:
        return (
            f"{str(unsafe)!a} belongs to another user, or others may write there, so the CPU kernels are built anew at "
            "this start; `chmod go-w` it, or"
        )
    if not runs_programs(directory):
        return f"{str(directory)!a} is mounted with noexec, so the CPU kernels are built anew at this start;"
    return None


def runs_programs(directory: Path) -> bool:
    """Whether the system loads libraries from an existing directory."""
    return not os.statvfs(directory).f_flag & os.ST_NOEXEC


def _make(directory: Path) -> None:
    """Make a directory and its parents for this user alone, whatever the umask; does nothing if that is impossible."""
    missing = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        for path in reversed(missing):
            path.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    except OSError:
        return


def writable_by_others(directory: Path) -> Path | None:
    """The first of a directory and its parents in which another user may put or exchange files; None if there is none.

    Others may write a parent that is sticky, as /tmp: they cannot rename what is not theirs.
    """
    if not _is_private(directory.stat()):
        return directory
    for parent in directory.parents:
        status = parent.stat()
        shared = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid))
        if status.st_uid not in (os.geteuid(), _ROOT) or (shared and not status.st_mode & stat.S_ISVTX):
            return parent
    return None


def _is_private(status: os.stat_result) -> bool:
    """Whether this user or root owns a file or folder, and no other user may write it."""
    return status.st_uid in (os.geteuid(), _ROOT) and not status.st_mode & _WRITABLE_BY_OTHERS


def _is_own_group(group_id: int) -> bool:
    """Whether a group is this user's private one, as many systems make it: folders are group-writable there."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(group_id)
    except KeyError:
        return False
    return group_id == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@contextmanager
def one_build(directory: Path, finished: Callable[[], bool], deadline: float) -> Iterator[Path]:
    """A folder in `directory` for the files of a build, while no other process builds there; it is removed at the end.

    Waits for another process until `finished()`, or until `deadline`, a time of `time.monotonic`: TimeoutError.
    Raises OSError if the directory cannot be written.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The system frees a lock of a process that ends, however it ends.
        alone = _lock(descriptor, finished, deadline)
        _remove_leftovers(directory, _SCRATCH, 0 if alone else _LEFT_AFTER)
        with tempfile.TemporaryDirectory(dir=directory, prefix=_SCRATCH) as scratch:
            yield Path(scratch)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, finished: Callable[[], bool], deadline: float) -> bool:
    """Lock an open directory; False if `finished()` comes first, or if locks are not supported.

    Raises TimeoutError after `deadline`.
    """
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        # Some network file systems have no locks. Two builds do each other no harm.
        except OSError:
            return False
        if finished():
            return False
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_SECONDS)


def _remove_leftovers(directory: Path, prefix: str, older_than: float) -> None:
    """Remove this user's folders of builds that were killed, if they are `older_than` seconds old."""
    for path in directory.glob(f"{prefix}*"):
        try:
            status = path.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime >= older_than:
                shutil.rmtree(path)
        # Another process removes it, or it is a file.
        except OSError:
            continue


def put(made: Path, target: Path) -> None:
    """Append the digest to a new library and move it to `target` in one step; `target` survives a power failure."""
    digest = hashlib.sha256(made.read_bytes()).digest()
    made.chmod(stat.S_IRWXU)
    with made.open("ab") as file:
        file.write(_MARK + digest)
        file.flush()
        os.fsync(file.fileno())
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
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
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _is_private(status):
            return False
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read()
    finally:
        os.close(descriptor)
    end = len(content) - len(_MARK) - _DIGEST_BYTES
    return end > 0 and content[end:] == _MARK + hashlib.sha256(content[:end]).digest()
