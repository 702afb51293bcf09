"""Reading a checkpoint directory: its settings, its headers, its tensors, and whether they obey the format.

Imports torch, safetensors and the standard library only: `morphoquant verify` runs without vLLM and transformers, and
the plugin calls `check_headers` before vLLM loads a single weight (vLLM does not report a tensor that is missing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import (
    INPUT_TENSORS,
    LayerSpec,
    QuantizationSpec,
    TensorSpec,
    check_values,
    stored_name,
    tensor_specs,
    unequal_input_tensors,
)
from morphoquant_vllm.format.token_table import check_token_table

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
# How safetensors headers spell the dtypes of the format.
HEADER_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
BIAS_DTYPES = ("F32", "BF16", "F16")
COPY_AGAIN = "copy it again"
CALIBRATE_AGAIN = "copy the checkpoint again, or calibrate again"


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about one tensor: the file that holds it, its dtype as safetensors spells it, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; MorphoQuantError naming the file where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MorphoQuantError(f"{path}: no such file; is {path.parent} a MorphoQuant checkpoint?") from error
    except (OSError, ValueError) as error:
        raise MorphoQuantError(f"{path}: cannot be read as JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(content, dict):
        raise MorphoQuantError(f"{path}: holds no JSON object; {COPY_AGAIN}")
    return content


def read_spec(directory: Path) -> QuantizationSpec:
    """The quantization_config of a checkpoint directory, checked; MorphoQuantError where it is not one of ours."""
    path = directory / CONFIG_FILE
    config = read_json(path).get("quantization_config")
    if not isinstance(config, dict):
        raise MorphoQuantError(
            f"{path}: no quantization_config: this is a plain model; make a MorphoQuant checkpoint of it with "
            "`morphoquant calibrate`"
        )
    try:
        return QuantizationSpec.from_dict(config)
    except MorphoQuantError as error:
        raise MorphoQuantError(f"{path}: {error}") from error


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """An open safetensors file; MorphoQuantError naming it where it is missing, truncated or something else."""
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise MorphoQuantError(f"{path}: missing; {COPY_AGAIN}") from error
    except (SafetensorError, OSError) as error:
        raise MorphoQuantError(f"{path}: truncated or not safetensors ({error}); {COPY_AGAIN}") from error


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers alone; index and files must agree in both directions."""
    if not directory.is_dir():
        raise MorphoQuantError(f"{directory}: no such directory")
    index = _read_index(directory)
    stored = {}
    for file_name in sorted(set(index.values())):
        with open_file(directory / file_name) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
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


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name. The format has an index even for one file: without it a lost tensor is not missed."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise MorphoQuantError(
            f"{directory}: has no {INDEX_FILE}; only safetensors weights are read; {CALIBRATE_AGAIN}"
        )
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MorphoQuantError(f"{path}: no weight_map; {COPY_AGAIN}")
    for name, file_name in weight_map.items():
        # A plain name of this directory, and never a pickle under another suffix.
        if (
            not isinstance(file_name, str)
            or Path(file_name).name != file_name
            or Path(file_name).suffix != ".safetensors"
        ):
            raise MorphoQuantError(f"{path}: {name} is placed in {file_name!r}, which is no safetensors file name")
    return weight_map


def check_headers(directory: Path, spec: QuantizationSpec) -> dict[str, str]:
    """File name of every tensor, after checking names, dtypes and shapes of the quantized layers (no values are read).

    Raises MorphoQuantError naming the file or tensor where one is missing, unexpected, truncated or misshapen.
    """
    stored = read_headers(directory)
    for name, layer in spec.layers.items():
        _check_layer_headers(directory, name, layer, tensor_specs(layer, len(spec.rows), spec.tensor_parallel), stored)
    for name, tensor in stored.items():
        owner = _owner(name, spec.layers)
        if owner is not None:
            _check_belongs(directory / tensor.file, name, owner, spec)
    return {name: tensor.file for name, tensor in stored.items()}


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
        found = stored.get(full_name)
        if found is None:
            raise MorphoQuantError(f"{directory}: tensor {full_name} is missing; {CALIBRATE_AGAIN}")
        if found.dtype not in dtypes or found.shape != shape:
            raise MorphoQuantError(
                f"{directory / found.file}: {full_name} is {found.dtype} {list(found.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)}; {CALIBRATE_AGAIN}"
            )


def _owner(tensor: str, layers: Mapping[str, LayerSpec]) -> str | None:
    """The innermost quantized layer above a tensor, if any."""
    parent = tensor
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in layers:
            return parent
    return None


def _check_belongs(file: Path, name: str, owner: str, spec: QuantizationSpec) -> None:
    """Refuse a tensor below a quantized layer that the format does not know there."""
    tensor = name.removeprefix(f"{owner}.")
    if tensor in tensor_specs(spec.layers[owner], len(spec.rows), spec.tensor_parallel):
        return
    if tensor == "bias":
        if not spec.layers[owner].bias:
            raise MorphoQuantError(
                f"{file}: {name} exists, but the config says that {owner} has no bias; calibrate again"
            )
    elif tensor == "weight":
        raise MorphoQuantError(f"{file}: {name} is a 16-bit weight of a quantized layer; {CALIBRATE_AGAIN}")
    else:
        raise MorphoQuantError(f"{file}: {name} is no tensor of a quantized layer; {CALIBRATE_AGAIN}")


def load_layer(directory: Path, files: Mapping[str, str], name: str, spec: QuantizationSpec) -> dict[str, Tensor]:
    """The tensors of one quantized layer by their name below it, its own `bias` included where it has one.

    `files` is what `check_headers` returned.
    """
    wanted = list(tensor_specs(spec.layers[name], len(spec.rows), spec.tensor_parallel)) + (
        ["bias"] if spec.layers[name].bias else []
    )
    by_file: dict[str, list[str]] = {}
    for tensor in wanted:
        by_file.setdefault(files[stored_name(name, tensor)], []).append(tensor)
    tensors = {}
    for file_name, names in by_file.items():
        with open_file(directory / file_name) as file:
            for tensor in names:
                tensors[tensor] = file.get_tensor(stored_name(name, tensor))
    return tensors


def verify_checkpoint(directory: Path) -> int:
    """Check everything that the format promises, values included; the number of quantized layers.

    Raises MorphoQuantError at the first thing that is wrong. Holds one layer at a time, or one tensor that is not
    quantized.
    """
    spec = read_spec(directory)
    check_token_table(directory, read_json(directory / CONFIG_FILE), spec)
    files = check_headers(directory, spec)
    for group, names in spec.shared_inputs().items():
        first: dict[str, Tensor] = {}
        for name in names:
            tensors = load_layer(directory, files, name, spec)
            check_values(name, tensors, spec.any_row, parallel=spec.layers[name].parallel, blocks=spec.tensor_parallel)
            if "bias" in tensors and not bool(tensors["bias"].isfinite().all()):
                raise MorphoQuantError(f"{stored_name(name, 'bias')}: holds NaN or infinite values; {CALIBRATE_AGAIN}")
            first = first or {tensor: tensors[tensor] for tensor in INPUT_TENSORS}
            unequal = unequal_input_tensors(first, tensors)
            if unequal:
                raise MorphoQuantError(
                    f"{stored_name(name, unequal[0])}: differs from that of {names[0]}, but the shards of {group} "
                    "share one input; calibrate again"
                )
    _check_carried_over(directory, files, spec)
    return len(spec.layers)


def _check_carried_over(directory: Path, files: Mapping[str, str], spec: QuantizationSpec) -> None:
    """No float tensor outside the quantized layers may hold a NaN (infinities may be meant: stored masks)."""
    by_file: dict[str, list[str]] = {}
    for name, file_name in files.items():
        if _owner(name, spec.layers) is None:
            by_file.setdefault(file_name, []).append(name)
    for file_name, names in by_file.items():
        with open_file(directory / file_name) as file:
            for name in names:
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and bool(tensor.isnan().any()):
                    raise MorphoQuantError(f"{directory / file_name}: {name} holds NaN; {CALIBRATE_AGAIN}")
