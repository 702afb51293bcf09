"""All or nothing: a checkpoint is written beside its destination and renamed when it is complete."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from calibration.output.written_files import foreign_file
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE
from morphoquant_vllm.format.schema import QUANT_METHOD

# Bytes of the longest ending that is added to the name of an output: ".partial-" and a tag.
_LONGEST_SUFFIX = len(".partial-12345678")


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
    check_length(place)
    with clear_write_errors(output):
        _tidy(partial, old, place)
    check_output(output, model, overwrite=overwrite)
    finished = False
    try:
        with clear_write_errors(output):
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
        yield partial
        # Hours may have passed, and others may have put files there.
        check_output(output, model, overwrite=overwrite)
        with clear_write_errors(output):
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
    with clear_write_errors(output):
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


def check_free_space(directory: Path, needed: int, name: str = "the checkpoint", flag: str = "--output") -> None:
    """Raise MorphoQuantError if the disk of `directory` has fewer than `needed` bytes free for `name`."""
    free = shutil.disk_usage(_existing(directory)).free
    if free < needed:
        raise MorphoQuantError(
            f"{directory.parent}: {name} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            f"make room, or choose another {flag}"
        )


def check_room(output: Path, work: Path, checkpoint: int, blocks: int) -> None:
    """Raise MorphoQuantError unless the disks have room for `checkpoint` and `blocks` bytes, before any work.

    They are the bytes of the new checkpoint and of the finished blocks in the work directory. Both are on the disk when
    the checkpoint is written.
    """
    places = [
        (_existing(path), path, size, flag)
        for path, size, flag in ((output, checkpoint, "--output"), (work, blocks, "--work"))
    ]
    for device in {folder.stat().st_dev for folder, *_ in places}:
        here = [place for place in places if place[0].stat().st_dev == device]
        folder, path, _, flag = here[0]
        needed, free = sum(size for _, _, size, _ in here), shutil.disk_usage(folder).free
        if free < needed:
            raise MorphoQuantError(
                f"{path}: calibration needs {needed / 1e9:.2f} GB there, but only {free / 1e9:.2f} GB are free; "
                f"make room, or choose another {flag}"
            )


def check_writable(path: Path, flag: str, *, replaced: bool) -> None:
    """Raise MorphoQuantError unless files can be written in the directory `path`.

    A directory that is `replaced` as a whole is written beside itself.
    """
    real = Path(os.path.realpath(path))
    try:
        # On Linux it has no name, so even a kill leaves nothing.
        with tempfile.TemporaryFile(dir=_existing(real.parent if replaced else real)):
            pass
    except OSError as error:
        raise MorphoQuantError(
            f"{path}: cannot be written ({error.strerror or error}); choose another {flag}"
        ) from error


def _existing(path: Path) -> Path:
    """The first of a path, after following links, and its parents that exists."""
    real = Path(os.path.realpath(path))
    return next(folder for folder in (real, *real.parents) if folder.exists())


def check_length(path: Path) -> None:
    """Raise MorphoQuantError if a new directory, or what is named after it, has a name too long for the disk."""
    real = Path(os.path.realpath(path))
    # Only parts that exist can be asked for the limit. Asking for a name that is too long fails, too.
    for index in range(1, len(real.parts)):
        parent, name = Path(*real.parts[:index]), real.parts[index]
        longest = _LONGEST_SUFFIX if real.parts[index + 1 :] == () else 0
        if parent.is_dir():
            limit = os.pathconf(parent, "PC_NAME_MAX")
        if len(os.fsencode(name)) + longest > limit:
            raise MorphoQuantError(
                f"{name[:40]}...: the name is too long; choose one of at most {limit - longest} bytes"
            )


def check_output(output: Path, model: Path, *, overwrite: bool) -> None:
    """Raise MorphoQuantError if a checkpoint may not be written to `output`."""
    here, there = Path(os.path.realpath(output)), Path(os.path.realpath(model))
    if here == there or here in there.parents or there in here.parents:
        raise MorphoQuantError(f"{output}: --output and the model directory {model} overlap; choose another --output")
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise MorphoQuantError(f"{output}: exists and is not a directory; choose another --output")
    if os.path.ismount(Path(os.path.realpath(output))):
        # A finished checkpoint is renamed into place, and renaming onto a mount point fails.
        raise MorphoQuantError(f"{output}: is a mount point, which cannot be replaced; choose a directory below it")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise MorphoQuantError(f"{output}: exists and is not empty; choose another --output, or pass --overwrite")
    # --overwrite replaces an older checkpoint; it must not delete other directories or files.
    if output.is_symlink() or not _is_checkpoint(output):
        raise MorphoQuantError(
            f"{output}: is not a checkpoint (it lacks a {CONFIG_FILE} of this format), so it is not overwritten; "
            "remove it yourself"
        )
    foreign = foreign_file(output)
    if foreign is not None:
        raise MorphoQuantError(
            f"{output / foreign}: does not belong to a checkpoint, so {output.name} is not overwritten; move the file "
            "elsewhere, or choose another --output"
        )


def _is_checkpoint(directory: Path) -> bool:
    """Whether a directory's config.json is of this project's format, in any version."""
    try:
        settings = json.loads((directory / CONFIG_FILE).read_bytes()).get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


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
def clear_write_errors(
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
