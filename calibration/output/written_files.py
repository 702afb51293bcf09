"""Which files a checkpoint has: those that are copied from a model's directory, and those that are written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.beside import files_beside

# Written beside those that are copied: config, index and report; weights; the model card; the kept distributions.
_WRITTEN = tuple(
    re.compile(pattern)
    for pattern in (
        r"(config|model\.safetensors\.index|morphoquant_calibration)\.json",
        r"[^/]*\.safetensors",
        r"README\.md",
        r"morphoquant_calibration/distributions\.safetensors",
    )
)

# What hubs, systems and Python leave in a folder; nobody misses it.
_LITTER = frozenset((".cache", ".gitattributes", ".DS_Store", "__pycache__"))


def copied_files(directory: Path) -> list[Path]:
    """Files of the source, relative to it, that are copied into a checkpoint byte for byte.

    MorphoQuantError naming one that is not a regular file.
    """
    found = files_beside(directory)
    for path in found:
        # A broken link has no size, and a FIFO no end.
        if not (directory / path).is_file():
            raise MorphoQuantError(f"{directory / path}: is not a regular file; download it again, or remove it")
    return found


def foreign_file(directory: Path) -> Path | None:
    """The first file below a checkpoint, relative to it, that neither calibration wrote nor a hub or system left."""
    known = set(files_beside(directory))
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if name not in _LITTER)
        for name in sorted(name for name in names if name not in _LITTER):
            path = (Path(folder) / name).relative_to(directory)
            if path not in known and not any(kind.fullmatch(path.as_posix()) for kind in _WRITTEN):
                return path
    return None
