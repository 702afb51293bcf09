"""Files that a crash leaves complete or absent, and that size and hash identify."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibration.output.staging import explain_write_errors
from morphoquant_vllm.errors import MorphoQuantError

# Suffix of a file until it is complete.
PARTIAL = ".partial"
# Field of a JSON file that holds the hash of the other fields.
_OWN_HASH = "sha256_of_the_rest"
_KEPT = "finished blocks are kept: make room there and run the same command again"
# The names that safetensors headers give to the dtypes in which a model runs.
_HEADER_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class FileRecord:
    """Identity of a file: its size in bytes, and the SHA-256 of its content."""

    nbytes: int
    sha256: str


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU, in hexadecimal: of their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's names to the disk: new, renamed and removed ones."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json_durably(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step and add its hash; after a crash it is either the old or the new file."""
    content = {**content, _OWN_HASH: _json_hash(content)}
    partial = path.with_name(path.name + PARTIAL)
    with explain_write_errors(path.parent, remedy=_KEPT):
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_directory(path.parent)


def write_tensors_durably(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a safetensors file as one step."""
    partial = path.with_name(path.name + PARTIAL)
    with explain_write_errors(path.parent, remedy=_KEPT):
        save_file(dict(tensors), partial, metadata={"format": "pt", **(metadata or {})})
        record = FileRecord(partial.stat().st_size, hash_file(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    return record


class StatesWriter:
    """Writes tensors "0", "1", ... of known shapes and one dtype into a safetensors file, one at a time.

    So a stream's hidden states need not all be in memory: safetensors itself writes only whole files. `finish` gives
    the file its name.
    """

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        self._path, self._partial = path, path.with_name(path.name + PARTIAL)
        self._shapes, self._dtype, self._written = [tuple(shape) for shape in shapes], dtype, 0
        header: dict[str, Any] = {}
        end = 0
        for index, shape in enumerate(self._shapes):
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[str(index)] = {"dtype": _HEADER_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        # The format requires that data start at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        self._hash = hashlib.sha256()
        with explain_write_errors(path.parent, remedy=_KEPT):
            self._file = self._partial.open("wb")
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        with explain_write_errors(self._path.parent, remedy=_KEPT):
            self._file.write(data)
        self._hash.update(data)

    def write(self, index: int, value: Tensor) -> None:
        """Write the tensor `index`; tensors come in order, with the announced shapes and dtype."""
        if index != self._written or tuple(value.shape) != self._shapes[index] or value.dtype != self._dtype:
            raise ValueError(f"{self._path}: state {index} {value.dtype} {list(value.shape)} is not the next one")
        self._put(value.contiguous().flatten().view(torch.uint8).numpy().data)
        self._written += 1

    def finish(self) -> FileRecord:
        """Flush the file to the disk and give it its name."""
        if self._written != len(self._shapes):
            raise ValueError(f"{self._path}: {self._written} of {len(self._shapes)} states were written")
        with explain_write_errors(self._path.parent, remedy=_KEPT):
            self._file.flush()
            os.fsync(self._file.fileno())
            record = FileRecord(self._file.tell(), self._hash.hexdigest())
            self._file.close()
            self._partial.rename(self._path)
        return record


def read_tensors(path: Path, names: Sequence[str] | None = None, *, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a safetensors file (None: all whose names begin so), each in separate memory, on the CPU.

    Raises MorphoQuantError naming the file if it is missing or damaged, or lacks a tensor.
    """
    reader = TensorReader(path)
    wanted = [name for name in reader.names() if name.startswith(prefix)] if names is None else names
    return {name: reader.read(name) for name in wanted}


class TensorReader:
    """Reads tensors of one safetensors file, which stays open."""

    def __init__(self, path: Path) -> None:
        """MorphoQuantError naming the file if it is missing or damaged."""
        self.path = path
        try:
            self._file = safe_open(str(path), "pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error)) from error

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file.keys())

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own; MorphoQuantError naming the file if it lacks the tensor."""
        try:
            found: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise damaged(self.path, str(error)) from error
        # The last bits of a product can depend on the alignment of its factors in memory.
        return found.clone()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; MorphoQuantError naming it if it is missing or damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """A JSON object that write_json_durably wrote; MorphoQuantError naming the file if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise damaged(path, f"not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop(_OWN_HASH, None) != _json_hash(content):
        raise damaged(path, "its content has changed")
    return content


def is_manifest(path: Path) -> bool:
    """Whether write_json_durably wrote a file, which may have changed since."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and _OWN_HASH in content


def _json_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def check_file(path: Path, record: FileRecord) -> None:
    """Raise MorphoQuantError naming the file if it is missing or its content has changed."""
    try:
        size = path.stat().st_size
        if size != record.nbytes:
            raise damaged(path, f"{size} bytes, {record.nbytes} were written")
        if hash_file(path) != record.sha256:
            raise damaged(path, "its content has changed")
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error


def damaged(path: Path, reason: str) -> MorphoQuantError:
    """Error for an unusable file of a work directory; nothing is deleted."""
    return MorphoQuantError(
        f"{path}: cannot be used ({reason}); put the file back, or pass --restart to begin anew (which drops the "
        "finished blocks)"
    )
