"""modules.json of sentence-transformers: the steps from a model's hidden states to a text's vector, and their folders.

A server reads it and the files of the folders that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import read_json_list

MODULES_FILE = "modules.json"
# Settings and weights of a step. A pickle may run code when it is read, so it counts for nothing.
_FILE_KINDS = (".json", ".safetensors")


@dataclass(frozen=True)
class SentenceModule:
    """One step: the name of its class, and its folder below the model's directory, which is empty for the directory."""

    kind: str
    folder: str


def read_modules(directory: Path) -> list[SentenceModule]:
    """The steps of a model directory in their order; none without a modules.json.

    MorphoQuantError if the file holds no such list, or names a folder outside the directory.
    """
    path = directory / MODULES_FILE
    if not path.exists():
        return []
    return [_module(path, entry) for entry in read_json_list(path)]


def module_files(directory: Path) -> list[Path]:
    """Files of all steps' folders that a server reads, relative to the directory; none if modules.json is damaged."""
    try:
        folders = sorted({module.folder for module in read_modules(directory)} - {""})
    except MorphoQuantError:
        return []
    return [
        path.relative_to(directory)
        for folder in folders
        if (directory / folder).is_dir()
        for path in sorted((directory / folder).iterdir())
        if path.suffix in _FILE_KINDS
    ]


def _module(path: Path, entry: Any) -> SentenceModule:
    kind, folder = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(folder, str):
        raise MorphoQuantError(f"{path}: does not give the type and the path of each module; download it again")
    parts = PurePosixPath(folder).parts
    # Converting leaves hidden folders out, and a link may lead outside.
    hidden = folder.startswith("/") or any(part.startswith(".") for part in parts) or not folder.isprintable()
    if hidden or not _is_below(path.parent, folder):
        raise MorphoQuantError(
            f"{path}: {folder!r} is no folder below the model's directory; move the folder there and correct the path"
        )
    return SentenceModule(kind, "/".join(parts))


def _is_below(directory: Path, folder: str) -> bool:
    """Whether links in `folder` do not lead out of the directory, nor in a circle."""
    try:
        place = (directory / folder).resolve()
        return place.is_relative_to(directory.resolve()) and (place.is_dir() or not place.exists())
    # RuntimeError: a circle of links. OSError: a name that the file system refuses.
    except (OSError, RuntimeError):
        return False
