"""The source model's directory: its config.json and the tensors of its safetensors files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE
from morphoquant_vllm.format.files import check_regular, read_json
from morphoquant_vllm.format.values import check_finite

# Weight file of a model in one file, which needs no index. MorphoQuant checkpoints always have an index.
SINGLE_FILE = "model.safetensors"
# Bytes per element by the dtype names of safetensors headers.
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a file's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data, in bytes."""
        return _DTYPE_BYTES[self.dtype] * self.elements

    @property
    def elements(self) -> int:
        """Number of the tensor's elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the tensor holds plain floats; only these can be quantized."""
        return self.dtype in _FLOAT_DTYPES


@dataclass(frozen=True)
class Source:
    """A source model whose config and headers were read; tensors are read on demand."""

    directory: Path
    config: dict[str, Any]
    # In the order of the files and of the names in them.
    tensors: dict[str, TensorInfo]

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype; MorphoQuantError if the file is damaged."""
        path = self.tensors[name].file
        try:
            with safe_open(str(path), "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise MorphoQuantError(f"{path}: {name} cannot be read ({error}); download the file again") from error

    def check_finite(self) -> None:
        """Refuse NaN and infinity in any float tensor: carried tensors are served unchanged."""
        for name, info in self.tensors.items():
            if info.is_float:
                check_finite(f"{info.file}: {name}", self.load(name), "download the file again")


def open_source(directory: Path | str) -> Source:
    """Read config and headers of a Hugging Face model directory.

    Raises MorphoQuantError naming a directory or file that is missing, damaged or already quantized, or whose weights
    are not safetensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MorphoQuantError(f"{directory}: no such model directory; download the model and give its directory")
    config = _read_config(directory / CONFIG_FILE)
    tensors: dict[str, TensorInfo] = {}
    for path, names in _weight_files(directory).items():
        tensors |= _read_header(path, names)
    return Source(directory, config, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MorphoQuantError(f"{path.parent}: no {path.name}; give a Hugging Face model directory")
    config = read_json(path)
    if _is_quantized(config):
        raise MorphoQuantError(
            f"{path}: the model is already quantized (quantization_config); give the 16-bit original"
        )
    return config


def _is_quantized(config: dict[str, Any]) -> bool:
    return bool(config.get("quantization_config")) or any(
        _is_quantized(value) for value in config.values() if isinstance(value, dict)
    )


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The safetensors files and the tensors that the index places in each (None: no index exists)."""
    index = directory / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MorphoQuantError(f"{index}: no weight_map; download it again")
        files: dict[Path, list[str] | None] = {}
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise MorphoQuantError(
                    f"{index}: {name} is placed in {file_name!r}, which is not a file name; download it again"
                )
            if Path(file_name).suffix != ".safetensors":
                raise MorphoQuantError(f"{index}: {name} is placed in {file_name}; only safetensors weights are read")
            names = files.setdefault(directory / file_name, [])
            assert names is not None
            names.append(name)
        if (directory / SINGLE_FILE).exists() and directory / SINGLE_FILE not in files:
            raise MorphoQuantError(
                f"{directory}: has {SINGLE_FILE} and {INDEX_FILE}, which does not name it; remove one of the two"
            )
        return dict(sorted(files.items()))
    if (directory / SINGLE_FILE).exists():
        return {directory / SINGLE_FILE: None}
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in directory.glob(pattern))
    if others:
        raise MorphoQuantError(
            f"{directory}: has {others[0]} but no {SINGLE_FILE}; only safetensors weights are read: convert the model"
        )
    raise MorphoQuantError(f"{directory}: no weights ({SINGLE_FILE} or {INDEX_FILE}); download the model again")


def _read_header(path: Path, names: list[str] | None) -> dict[str, TensorInfo]:
    if not path.exists():
        raise MorphoQuantError(f"{path}: named in {INDEX_FILE} but missing; download the model again")
    tensors = {}
    try:
        check_regular(path)
        with safe_open(str(path), "pt") as file:
            present = list(file.keys())
            absent = set(names or ()) - set(present)
            if absent:
                raise MorphoQuantError(f"{path}: {min(absent)} is in {INDEX_FILE} but missing here; download it again")
            for name in sorted(present if names is None else names):
                header = file.get_slice(name)
                tensors[name] = TensorInfo(path, header.get_dtype(), tuple(header.get_shape()))
    except (SafetensorError, OSError) as error:
        raise MorphoQuantError(f"{path}: truncated or not safetensors ({error}); download it again") from error
    strange = [info.dtype for info in tensors.values() if info.dtype not in _DTYPE_BYTES]
    if strange:
        raise MorphoQuantError(f"{path}: dtype {strange[0]} is not supported; give the 16-bit original")
    return tensors
