"""The part of a work directory about learning: targets, the state of unfinished learning, and its result.

learn-targets.safetensors   the last states of the 16-bit model, and sizes of its outputs
learn-state.safetensors     what the next steps depend on
learned.safetensors         what was learned
learned.json                its figures, and the hash of that file: written last

The first two hold the hash of their own tensors. The state is replaced again and again, and a kill between two writes
would leave it with another one's hash in a second file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.work.directory import WorkDirectory
from calibration.work.durable_files import (
    FileRecord,
    check_file,
    damaged,
    hash_tensors,
    read_manifest,
    read_metadata,
    read_tensors,
    sync_directory,
    write_json_durably,
    write_tensors_durably,
)

LEARNED_FILE = "learned.json"
# Files that are needed only until the result is kept.
TARGETS, STATE = "learn-targets", "learn-state"
_RESULT = "learned"


def keep_part(work: WorkDirectory, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep the targets or the state for a resumed run."""
    metadata = {"settings": work.run_hash, "sha256": hash_tensors(tensors)}
    write_tensors_durably(_file(work, part), tensors, metadata)
    sync_directory(work.path)


def read_part(work: WorkDirectory, part: str) -> dict[str, Tensor] | None:
    """The targets or the state; None if there are none yet. MorphoQuantError if the file is damaged."""
    path = _file(work, part)
    if not path.exists():
        return None
    metadata = read_metadata(path)
    if metadata.get("settings") != work.run_hash:
        raise damaged(path, "it belongs to another run")
    tensors = read_tensors(path)
    if metadata.get("sha256") != hash_tensors(tensors):
        raise damaged(path, "its content has changed")
    return tensors


def keep_learned(work: WorkDirectory, changes: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
    """Keep what was learned, and drop what only its learning needed."""
    record = write_tensors_durably(_file(work, _RESULT), changes)
    content = {"settings": work.run_hash, "figures": dict(figures), "file": asdict(record)}
    write_json_durably(work.path / LEARNED_FILE, content)
    for part in (STATE, TARGETS):
        _file(work, part).unlink(missing_ok=True)


def read_figures(work: WorkDirectory) -> dict[str, Any] | None:
    """The figures of finished learning; None if it is not finished. MorphoQuantError if a file is damaged."""
    path = work.path / LEARNED_FILE
    if not path.exists():
        return None
    content = read_manifest(path)
    if content.get("settings") != work.run_hash:
        raise damaged(path, "it belongs to another run")
    check_file(_file(work, _RESULT), FileRecord(**content["file"]))
    figures: dict[str, Any] = content["figures"]
    return figures


def read_changes(work: WorkDirectory) -> dict[str, Tensor]:
    """What was learned, by the names of learn.changes."""
    return read_tensors(_file(work, _RESULT))


def _file(work: WorkDirectory, part: str) -> Path:
    return work.path / f"{part}.safetensors"
