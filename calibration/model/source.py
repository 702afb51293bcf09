"""The source model's directory: its config.json and the tensors of its safetensors files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibration.model.embedders import check_modules
from calibration.model.fp8 import (
    FP8_DTYPES,
    block_size,
    dequantize,
    fp8_scheme,
    is_serving_only,
    quantization_configs,
    scale_fits,
    scale_names,
    without_quantization,
)
from calibration.model.refusals import check_config, check_one_model
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
    # As it is read: BF16 for an FP8 weight.
    dtype: str
    shape: tuple[int, ...]
    # Of an FP8 weight: its scale's name and file, and rows and columns of a block, if each block has a scale.
    scale: tuple[str, Path] | None = None
    block: tuple[int, int] | None = None

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
    # Without settings of quantization.
    config: dict[str, Any]
    # In the order of the files and of the names in them. An FP8 weight stands for itself and its scale.
    tensors: dict[str, TensorInfo]
    # The kind of the FP8 weights that are read as 16 bit, in words; empty if there are none.
    fp8: str = ""

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype, FP8 as bfloat16; MorphoQuantError if the file is damaged."""
        info = self.tensors[name]
        stored = _load(info.file, name)
        if info.scale is None:
            return stored
        scale, path = info.scale
        return dequantize(stored, _load(path, scale), info.block)

    def load_part(self, name: str, index: int) -> Tensor:
        """Element `index` of a tensor's first dimension, as `load` gives it; the others are not read."""
        info = self.tensors[name]
        if info.scale is not None:
            return self.load(name)[index].clone()
        return _load(info.file, name, index)

    def check_finite(self) -> None:
        """Refuse NaN and infinity in any float tensor: carried tensors are served unchanged."""
        for name, info in self.tensors.items():
            if info.is_float:
                check_finite(f"{info.file}: {name}", self.load(name), "download the file again")


def _load(path: Path, name: str, index: int | None = None) -> Tensor:
    try:
        with safe_open(str(path), "pt") as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]
    except (SafetensorError, OSError) as error:
        raise MorphoQuantError(f"{path}: {name} cannot be read ({error}); download the file again") from error


def open_source(directory: Path | str) -> Source:
    """Read config and headers of a Hugging Face model directory.

    FP8 weights are read as 16 bit. Raises MorphoQuantError naming a directory or file that is missing, damaged or
    quantized otherwise, or whose weights are not safetensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MorphoQuantError(f"{directory}: no such model directory; download the model and give its directory")
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:
        raise MorphoQuantError(f"{directory}: the path is not UTF-8, which safetensors needs; rename it") from error
    config = _read_config(directory / CONFIG_FILE)
    check_config(config)
    check_one_model(directory, config)
    check_modules(directory)
    quantized = _quantization(directory / CONFIG_FILE, config)
    tensors: dict[str, TensorInfo] = {}
    for path, names in _weight_files(directory).items():
        tensors |= _read_header(path, names)
    kind = ""
    if any(info.dtype in FP8_DTYPES for info in tensors.values()):
        tensors = _joined_scales(tensors, block_size(quantized or {}))
        kind = fp8_scheme(quantized) or "FP8"
    return Source(directory, without_quantization(config), tensors, kind)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MorphoQuantError(f"{path.parent}: no {path.name}; give a Hugging Face model directory")
    return read_json(path)


def _quantization(path: Path, config: dict[str, Any]) -> Mapping[str, Any] | None:
    """The settings of an FP8 model's quantization, None if the model is not quantized."""
    found = list(quantization_configs(config))
    if not found:
        return None
    if any(fp8_scheme(settings) is None or settings != found[0] for settings in found):
        methods = [str(settings.get("quant_method")) for settings in found if isinstance(settings, Mapping)]
        named = ", ".join(dict.fromkeys(methods)) or "unknown means"
        raise MorphoQuantError(
            f"{path}: the model is already quantized (quantization_config) by {named}; "
            f"download the 16-bit original{_base_model(path.parent)}, or its FP8 version"
        )
    settings: Mapping[str, Any] = found[0]
    return settings


def _base_model(directory: Path) -> str:
    """The original model by the model card, in words; empty if there is no card that names one."""
    try:
        _, header, _ = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        named = yaml.safe_load(header)["base_model"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, RecursionError):
        return ""
    return f" ({named[0] if isinstance(named, list) and named else named})"


def _joined_scales(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None) -> dict[str, TensorInfo]:
    """The tensors with each FP8 weight and its scale as one 16-bit tensor, and without those of FP8 arithmetic."""
    joined: dict[str, TensorInfo] = {}
    scales: set[str] = set()
    for name, info in tensors.items():
        if info.dtype not in FP8_DTYPES:
            joined[name] = info
            continue
        scale = next((other for other in scale_names(name) if other in tensors), None)
        if scale is None or not scale_fits(info.shape, tensors[scale].shape, block):
            state = "no scale" if scale is None else f"a scale of shape {list(tensors[scale].shape)}"
            raise MorphoQuantError(f"{info.file}: {name} is FP8 with {state}; download the 16-bit original")
        scales.add(scale)
        joined[name] = replace(info, dtype="BF16", scale=(scale, tensors[scale].file), block=block)
    return {name: info for name, info in joined.items() if name not in scales and not is_serving_only(name)}


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The safetensors files and the tensors that the index places in each (None: no index exists)."""
    index = directory / INDEX_FILE
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MorphoQuantError(f"{index}: no weight_map; download it again")
        if not isinstance(content.get("metadata"), dict):
            raise MorphoQuantError(f'{index}: no metadata, which transformers asks for; add "metadata": {{}} to it')
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
            # transformers reads what the files hold, wherever the index places it.
            unnamed = set() if names is None else set(present) - set(names)
            if unnamed:
                raise MorphoQuantError(
                    f"{path}: holds {min(unnamed)}, which {INDEX_FILE} does not place there; download the model again"
                )
            for name in sorted(present):
                header = file.get_slice(name)
                tensors[name] = TensorInfo(path, header.get_dtype(), tuple(header.get_shape()))
    except (SafetensorError, OSError) as error:
        raise MorphoQuantError(f"{path}: truncated or not safetensors ({error}); download it again") from error
    strange = [info.dtype for info in tensors.values() if info.dtype not in _DTYPE_BYTES]
    if strange:
        raise MorphoQuantError(f"{path}: dtype {strange[0]} is not supported; give the 16-bit original")
    return tensors
