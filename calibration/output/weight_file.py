"""Weight files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_READ_WRITE = 0o666


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may enter its directory may read; safetensors lets only the owner."""
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    # The directory was made with the umask, which can be read only by setting it.
    path.chmod(path.parent.stat().st_mode & _READ_WRITE)
