"""Reads a checkpoint directory: its settings, headers and tensors. Checks that they obey the format.

Imports torch, safetensors and the standard library only: `morphoquant verify` runs without vLLM and transformers.
`verify` checks values and content too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import COPY_AGAIN, check_entries, open_file, read_json
from morphoquant_vllm.format.integrity import Integrity
from morphoquant_vllm.format.layers import (
    INPUT_TENSORS,
    OUTPUT_TENSORS,
    LayerSpec,
    TensorSpec,
    input_holder,
    stored_name,
)
from morphoquant_vllm.format.schema import QuantizationSpec

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
# How safetensors headers spell the dtypes of the format.
HEADER_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
BIAS_DTYPES = ("F32", "BF16", "F16")
# Tensors that only a quantized layer holds.
LAYER_TENSORS = frozenset((*INPUT_TENSORS, *(name for names in OUTPUT_TENSORS.values() for name in names)))
CALIBRATE_AGAIN = "copy the checkpoint again, or calibrate again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's entry in a header: its file, its dtype as safetensors spells it, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_spec(directory: Path) -> QuantizationSpec:
    """The checked quantization_config of a checkpoint directory; MorphoQuantError if it is not a MorphoQuant one."""
    path = directory / CONFIG_FILE
    config = read_json(path).get("quantization_config")
    if not isinstance(config, dict):
        raise MorphoQuantError(
            f"{path}: has no quantization_config, so this is a plain model; make a MorphoQuant checkpoint of it with "
            "`morphoquant calibrate`"
        )
    try:
        return QuantizationSpec.from_dict(config)
    except MorphoQuantError as error:
        raise MorphoQuantError(f"{path}: {error}") from error


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers alone; index and files must agree in both directions."""
    check_entries(directory)
    index = read_index(directory)
    _refuse_other_weights(directory, index)
    stored = {}
    for file_name in sorted(set(index.values())):
        with open_file(directory / file_name) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if index.get(name) != file_name:
                    raise MorphoQuantError(
                        f"{directory / file_name}: holds {name}, which {INDEX_FILE} does not place there; "
                        f"{CALIBRATE_AGAIN}"
                    )
                header = file.get_slice(name)
                stored[name] = StoredTensor(file_name, header.get_dtype(), tuple(header.get_shape()))
    for name, file_name in index.items():
        if name not in stored:
            raise MorphoQuantError(f"{directory / file_name}: {name} is in {INDEX_FILE} but missing here; {COPY_AGAIN}")
    return stored


def read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name. Even a single file has an index: without it, a lost tensor would go unnoticed."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise MorphoQuantError(
            f"{directory}: has no {INDEX_FILE}; only safetensors weights are read; {CALIBRATE_AGAIN}"
        )
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MorphoQuantError(f"{path}: no weight_map; {COPY_AGAIN}")
    for name, file_name in weight_map.items():
        # A plain file name in this directory, never a pickle under another suffix.
        if (
            not isinstance(file_name, str)
            or Path(file_name).name != file_name
            or Path(file_name).suffix != ".safetensors"
            # File systems refuse names with a zero byte or half a character.
            or not file_name.isprintable()
        ):
            raise MorphoQuantError(f"{path}: {name} is placed in {file_name!r}, which is not a safetensors file name")
    return weight_map


def _refuse_other_weights(directory: Path, index: Mapping[str, str]) -> None:
    """Refuse weight files that the index does not name: one loader would read them, another would not."""
    others = sorted({path.name for path in directory.glob("*.safetensors")} - set(index.values()))
    if others:
        raise MorphoQuantError(
            f"{directory / others[0]}: is not named in {INDEX_FILE} beside it; remove one of the two"
        )


def check_headers(directory: Path, spec: QuantizationSpec) -> dict[str, str]:
    """Check names, dtypes and shapes of the quantized layers from the headers alone; the file name of every tensor.

    Raises MorphoQuantError naming a file or tensor that is missing, unexpected, truncated or misshapen.
    """
    stored = read_headers(directory)
    for name, layer in spec.linears.items():
        _check_layer_headers(directory, name, layer, spec.stored_tensors(name), stored)
    carried = []
    for name, tensor in stored.items():
        owner = owner_of(name, spec.linears)
        if owner is not None:
            _check_belongs(directory / tensor.file, name, owner, spec)
        elif name.rpartition(".")[2] in LAYER_TENSORS:
            raise MorphoQuantError(
                f"{directory / tensor.file}: {name} belongs to a quantized layer that quantization_config does not "
                f"list; {CALIBRATE_AGAIN}"
            )
        else:
            carried.append(name)
    if spec.integrity is not None:
        _check_list(directory, carried, {tensor.file for tensor in stored.values()}, spec.integrity)
    return {name: tensor.file for name, tensor in stored.items()}


def _check_list(directory: Path, carried: list[str], files: set[str], integrity: Integrity) -> None:
    """Refuse carried tensors and files that differ from the checkpoint's lists."""
    listed = set(integrity.carried)
    for name in sorted(listed - set(carried)):
        raise MorphoQuantError(f"{directory}: tensor {name} is missing; {CALIBRATE_AGAIN}")
    for name in sorted(set(carried) - listed):
        raise MorphoQuantError(f"{directory}: tensor {name} is not in the checkpoint's list; {CALIBRATE_AGAIN}")
    for name in sorted(files ^ integrity.files.keys()):
        raise MorphoQuantError(
            f"{directory / name}: {INDEX_FILE} and quantization_config disagree about it; {CALIBRATE_AGAIN}"
        )
    for name, file in integrity.files.items():
        size = (directory / name).stat().st_size
        if size != file.bytes:
            raise MorphoQuantError(f"{directory / name}: has {size} bytes, not {file.bytes}; {COPY_AGAIN}")


def _check_layer_headers(
    directory: Path,
    name: str,
    layer: LayerSpec,
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, StoredTensor],
) -> None:
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        tensor: ((HEADER_DTYPES[want.dtype],), want.shape) for tensor, want in specs.items()
    }
    if layer.bias:
        expected["bias"] = (BIAS_DTYPES, (layer.out_features,))
    for tensor, (dtypes, shape) in expected.items():
        full_name = stored_name(name, tensor)
        header = stored.get(full_name)
        if header is None:
            raise MorphoQuantError(f"{directory}: tensor {full_name} is missing; {CALIBRATE_AGAIN}")
        if header.dtype not in dtypes or header.shape != shape:
            raise MorphoQuantError(
                f"{directory / header.file}: {full_name} is {header.dtype} {list(header.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)}; {CALIBRATE_AGAIN}"
            )


def owner_of(tensor: str, layers: Mapping[str, LayerSpec]) -> str | None:
    """The innermost quantized layer above a tensor, if any."""
    parent = tensor
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in layers:
            return parent
    return None


def _check_belongs(file: Path, name: str, owner: str, spec: QuantizationSpec) -> None:
    """Refuse a tensor below the quantized layer `owner` that the format does not define."""
    tensor = name.removeprefix(f"{owner}.")
    if tensor in spec.stored_tensors(owner):
        return
    if tensor == "bias":
        if not spec.linears[owner].bias:
            raise MorphoQuantError(
                f"{file}: {name} exists, but the config says that {owner} has no bias; calibrate again"
            )
    elif tensor == "weight":
        raise MorphoQuantError(f"{file}: {name} is a 16-bit weight of a quantized layer; {CALIBRATE_AGAIN}")
    elif tensor in INPUT_TENSORS:
        raise MorphoQuantError(
            f"{file}: {name} exists, but the experts of a layer share one input, which the first one holds; "
            f"{CALIBRATE_AGAIN}"
        )
    else:
        raise MorphoQuantError(f"{file}: {name} is not a tensor of a quantized layer; {CALIBRATE_AGAIN}")


def load_layer(directory: Path, files: Mapping[str, str], name: str, spec: QuantizationSpec) -> dict[str, Tensor]:
    """The tensors of one layer of `spec.layers` by their name below it, with `bias` if the layer has one.

    `files` is the result of `check_headers`.
    """
    wanted = [*spec.stored_tensors(name), *(["bias"] if spec.layers[name].bias else [])]
    with _OpenFiles(directory, files) as opened:
        return opened.tensors(name, wanted)


def load_experts(
    directory: Path, files: Mapping[str, str], name: str, spec: QuantizationSpec
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each linear of the list of experts `name`, and its tensors by their name below it.

    Those of gate_proj and up_proj have the input's tensors, too, which the file holds once. One linear is in memory
    at a time. `files` is the result of `check_headers`.
    """
    with _OpenFiles(directory, files) as opened:
        shared = opened.tensors(input_holder(name), INPUT_TENSORS)
        for layer, settings in spec.experts[name].layers(name).items():
            stored = opened.tensors(layer, spec.stored_tensors(layer))
            yield layer, stored if settings.parallel == "row" else shared | stored


def load_input(directory: Path, files: Mapping[str, str], layer: str) -> dict[str, Tensor]:
    """INPUT_TENSORS of a linear that stores them; `files` is the result of `check_headers`."""
    with _OpenFiles(directory, files) as opened:
        return opened.tensors(layer, INPUT_TENSORS)


class _OpenFiles(ExitStack):
    """The weight files of a checkpoint, each opened once: a header of many experts takes long to read."""

    def __init__(self, directory: Path, files: Mapping[str, str]) -> None:
        super().__init__()
        self.directory, self.files = directory, files
        self.handles: dict[str, Any] = {}

    def tensors(self, layer: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of a layer by their name below it."""
        return {name: self._handle(stored_name(layer, name)).get_tensor(stored_name(layer, name)) for name in names}

    def _handle(self, tensor: str) -> Any:
        file = self.files[tensor]
        if file not in self.handles:
            self.handles[file] = self.enter_context(open_file(self.directory / file))
        return self.handles[file]
