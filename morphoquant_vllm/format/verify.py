"""Verifies that a checkpoint is whole and undamaged: every rule of the format, including values and content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.beside import changed_settings, check_decisive
from morphoquant_vllm.format.checkpoint import (
    CALIBRATE_AGAIN,
    CONFIG_FILE,
    check_headers,
    load_experts,
    load_layer,
    owner_of,
    read_spec,
)
from morphoquant_vllm.format.files import COPY_AGAIN, open_file, read_json
from morphoquant_vllm.format.integrity import check_config, file_digest
from morphoquant_vllm.format.layers import INPUT_TENSORS, stored_name
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.token_table import check_token_table
from morphoquant_vllm.format.values import check_bias, check_finite, check_values, unequal_input_tensors

# Warning for a checkpoint whose format cannot show more.
OLD_VERSION = (
    "format_version 2 lists neither tensors nor hashes: a missing norm, embedding or head and damaged weights are not "
    "noticed; `morphoquant convert` makes version 3 of it"
)
# Files beside the weights that tokenizer, processor and server read. If one is damaged, their errors do not name it.
_READ_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("generation_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)


def verify_checkpoint(
    directory: Path, *, checksums: bool = True, complete: bool = True, on_bytes: Callable[[int], None] | None = None
) -> QuantizationSpec:
    """Check every rule of the format; the checkpoint's settings.

    Raises MorphoQuantError at the first violation. Holds one layer in memory at a time. With `checksums` every weight
    file is read once, for its SHA-256 and for NaN and infinity in the carried tensors. Without `complete` files
    beside the weights may be missing, as in a hub's cache. `on_bytes` gets the bytes of each chunk that was read.
    """
    spec = checked_settings(directory, checksums=checksums, complete=complete)
    files = check_headers(directory, spec)
    for group, names in spec.shared_inputs().items():
        _check_group(directory, files, group, names, spec)
    for experts in spec.experts:
        for name, tensors in load_experts(directory, files, experts, spec):
            _check_layer(name, tensors, spec)
    if checksums:
        carried = {name for name in files if owner_of(name, spec.linears) is None}
        for file_name in sorted(set(files.values())):
            _check_content(directory / file_name, carried, spec, on_bytes)
    return spec


def checked_settings(directory: Path, *, checksums: bool = True, complete: bool = True) -> QuantizationSpec:
    """The settings of a checkpoint, whose config.json and files beside the weights are checked; as verify_checkpoint.

    Raises MorphoQuantError at the first violation.
    """
    spec = read_spec(directory)
    config = read_json(directory / CONFIG_FILE)
    if spec.integrity is not None:
        check_config(directory / CONFIG_FILE, config, spec.integrity)
        check_decisive(directory, spec.integrity.beside, complete=complete, checksums=checksums)
    check_beside(directory, config, spec)
    return spec


def check_beside(directory: Path, config: Mapping[str, Any], spec: QuantizationSpec) -> None:
    """Refuse files beside the weights that are no JSON, or that do not fit the placeholder ids of `spec`.

    The directory may also be the source's, whose files a checkpoint gets; `config` is its config.json.
    """
    check_token_table(directory, config, spec)
    for path in (directory / name for name in _READ_BESIDE):
        if path.exists():
            read_json(path)


def remarks(directory: Path, spec: QuantizationSpec, *, complete: bool = True) -> list[str]:
    """What to say of a checkpoint that is in order, one line each; `complete` as for verify_checkpoint."""
    if spec.integrity is None:
        return [OLD_VERSION]
    return [
        f"{name} is not that of the model that was calibrated; copy it again, unless it was changed on purpose"
        for name in changed_settings(directory, spec.integrity.beside, spec.integrity.beside_version, complete=complete)
    ]


def _check_group(
    directory: Path, files: Mapping[str, str], group: str, names: list[str], spec: QuantizationSpec
) -> None:
    """Check the values of the layers that share one input."""
    first: dict[str, Tensor] = {}
    for name in names:
        tensors = load_layer(directory, files, name, spec)
        _check_layer(name, tensors, spec)
        first = first or {tensor: tensors[tensor] for tensor in INPUT_TENSORS}
        unequal = unequal_input_tensors(first, tensors)
        if unequal:
            raise MorphoQuantError(
                f"{stored_name(name, unequal[0])}: differs from that of {names[0]}, but the shards of {group} "
                "share one input; calibrate again"
            )


def _check_layer(name: str, tensors: Mapping[str, Tensor], spec: QuantizationSpec) -> None:
    check_values(name, tensors, spec.any_row, parallel=spec.linears[name].parallel, blocks=spec.tensor_parallel)
    if "bias" in tensors:
        check_bias(stored_name(name, "bias"), tensors["bias"])


def _check_content(
    path: Path, carried: set[str], spec: QuantizationSpec, on_bytes: Callable[[int], None] | None
) -> None:
    """Check a file's carried tensors for NaN and infinity, then its SHA-256 if the checkpoint lists one."""
    with open_file(path) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            if name in carried:
                check_finite(f"{path}: {name}", file.get_tensor(name), CALIBRATE_AGAIN)
    if spec.integrity is not None and file_digest(path, on_bytes) != spec.integrity.files[path.name]:
        raise MorphoQuantError(f"{path}: is damaged (its SHA-256 is not the recorded one); {COPY_AGAIN}")
