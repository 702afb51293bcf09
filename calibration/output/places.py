"""Places that a user names, checked before the work: whether they may be written, can be, and have room."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from calibration.output.written_files import foreign_file
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE
from morphoquant_vllm.format.files import check_regular
from morphoquant_vllm.format.schema import QUANT_METHOD

# Bytes of the longest ending that is added to the name of an output: ".partial-" and a tag.
_LONGEST_SUFFIX = len(".partial-12345678")


def check_name(path: Path) -> None:
    """Raise MorphoQuantError if a new directory, or what is named after it, has a name that cannot be used."""
    real = Path(os.path.realpath(path))
    if not real.name:
        raise MorphoQuantError(f"{path}: is the root of all files, where no directory can be put; choose one below it")
    try:
        str(real).encode()
    except UnicodeEncodeError as error:
        # safetensors takes paths in UTF-8 alone.
        raise MorphoQuantError(f"{path}: the path is not UTF-8, which weight files need; choose another") from error
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
    if output.is_symlink():
        raise MorphoQuantError(f"{output}: is a link, which --overwrite does not follow; give {here} as --output")
    if not _is_checkpoint(output):
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


def _is_checkpoint(directory: Path) -> bool:
    """Whether a directory's config.json is of this project's format, in any version."""
    try:
        check_regular(directory / CONFIG_FILE)
        settings = json.loads((directory / CONFIG_FILE).read_bytes()).get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD
    except (OSError, ValueError, AttributeError, RecursionError, MorphoQuantError):
        return False


def _existing(path: Path) -> Path:
    """The first of a path, after following links, and its parents that exists."""
    real = Path(os.path.realpath(path))
    return next(folder for folder in (real, *real.parents) if folder.exists())
