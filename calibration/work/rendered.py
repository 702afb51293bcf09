"""Rendered samples with media, on disk until the decoder's inputs are captured: together they may not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.output.staging import explain_write_errors
from calibration.work.durable_files import read_tensors

_FILES = "rendered-*.safetensors"


class StoredInputs(Mapping[str, Tensor]):
    """A model's inputs in a file. Each tensor is read when it is asked for, and not kept."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path, self._names = path, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return read_tensors(self._path, (name,))[name]

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def store_media(directory: Path, place: int, inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """The inputs of the sample `place`: stored in the work directory if they have media, else as they are.

    A run that is interrupted renders again, so the file need not outlive a crash. MorphoQuantError if the disk is full.
    """
    if not media_bytes(inputs):
        return inputs
    path = directory / f"rendered-{place:05}.safetensors"
    # Tensors of a file may not share memory.
    own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in inputs.items()}
    with explain_write_errors(directory, remedy="make room, or choose another --work"):
        save_file(own, path)
    return StoredInputs(path, tuple(inputs))


def media_bytes(inputs: Mapping[str, Tensor]) -> int:
    """Bytes of the pixels and sounds among a model's inputs; the others are tokens, masks and sizes."""
    return sum(value.nbytes for value in inputs.values() if value.is_floating_point())


def stored_bytes(directory: Path) -> int:
    """Bytes of all rendered samples in a work directory."""
    return sum(path.stat().st_size for path in directory.glob(_FILES))


def drop_rendered(directory: Path) -> None:
    """Remove the rendered samples of a work directory."""
    for path in directory.glob(_FILES):
        path.unlink(missing_ok=True)
