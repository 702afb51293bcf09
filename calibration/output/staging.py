"""All or nothing: a checkpoint is written beside its destination and renamed when it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from calibration.output.places import check_name, check_output
from morphoquant_vllm.errors import MorphoQuantError


@contextmanager
def staged_directory(output: Path, model: Path, *, overwrite: bool, tag: str) -> Iterator[Path]:
    """A new directory beside `output` to write into; it becomes `output` on success and disappears on any failure.

    Leftovers of a killed run with the same `tag`, of at most 8 letters, are removed first. The caller ensures that no
    other run uses the tag.

    Raises MorphoQuantError if `output` exists and may not be replaced, is a mount point or overlaps the source `model`.
    A full disk and other failures to write raise it too. `output` is checked before and after the work, since others
    may fill it meanwhile.
    """
    # "." and ".." have no name from which to build a sibling's.
    place = Path(os.path.realpath(output))
    partial, old = (place.with_name(f"{place.name}.{kind}-{tag}") for kind in ("partial", "old"))
    check_name(place)
    with explain_write_errors(output):
        _tidy(partial, old, place)
    check_output(output, model, overwrite=overwrite)
    finished = False
    try:
        with explain_write_errors(output):
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
        yield partial
        # Hours may have passed, and others may have put files there.
        check_output(output, model, overwrite=overwrite)
        with explain_write_errors(output):
            _sync_files(partial)
            _swap_in(partial, place, old, overwrite)
        finished = True
    finally:
        if not finished:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Keep other conversions from writing `output` meanwhile; MorphoQuantError if one does."""
    place = Path(os.path.realpath(output))
    lock = place.with_name(f".{place.name}.convert-lock")
    with explain_write_errors(output):
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock)
    if descriptor is None:
        raise MorphoQuantError(f"{output}: another conversion writes it; wait for its end, or choose another --output")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """The descriptor of a new lock file, None if another process holds it. The system drops a lock with its holder.

    `filelock` belongs to the extra `calibration`, which a conversion does not need.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who held it removes the file at the end: then this descriptor's is not the one that others see.
        current = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    except BlockingIOError:
        current = False
    if not current:
        os.close(descriptor)
        return None
    return descriptor


def _tidy(partial: Path, old: Path, output: Path) -> None:
    """Undo the leftovers of a run that was killed while writing, or between the two renames of a replacement."""
    if partial.exists():
        shutil.rmtree(partial)
    if not old.exists():
        return
    if output.exists():
        shutil.rmtree(old)
    else:
        old.rename(output)


def _sync_files(directory: Path) -> None:
    """Wait until every file has reached the disk: the work directory is removed next."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap_in(partial: Path, output: Path, old: Path, overwrite: bool) -> None:
    if not overwrite or not output.exists():
        # Renaming onto an empty directory works; the system refuses to rename onto a filled one.
        partial.rename(output)
        return
    output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def explain_write_errors(
    output: Path,
    model: Path | None = None,
    remedy: str = "nothing was left there: make room or choose another --output",
) -> Iterator[None]:
    """Turn OS errors while writing below or beside `output` into a MorphoQuantError that ends in `remedy`.

    For a file of the source directory `model`, the error says that this file cannot be read.
    """

    def failed(reason: str) -> MorphoQuantError:
        return MorphoQuantError(f"{output}: cannot be written ({reason}); {remedy}")

    try:
        yield
    except SafetensorError as error:
        # safetensors reports a full disk only in its message.
        full = f"os error {errno.ENOSPC})" in str(error)
        raise failed(os.strerror(errno.ENOSPC) if full else str(error)) from error
    except OSError as error:
        # If both files of a copy are named, reading had begun, and writing failed.
        if model is not None and error.filename and error.filename2 is None:
            source = Path(os.fsdecode(error.filename))
            if source.is_relative_to(model):
                raise MorphoQuantError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error
        file = f"{Path(str(error.filename)).name}: " if error.filename else ""
        raise failed(f"{file}{error.strerror or error}") from error
