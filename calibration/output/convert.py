"""Converts an older checkpoint to the newest version, and group scales to two-level scales.

Holds in memory the tensors of one changed file and of one more layer. Needs torch and safetensors only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from calibration.output.json_file import write_json
from calibration.output.places import check_free_space, check_output, check_writable
from calibration.output.staging import explain_write_errors, only_run, staged_directory
from calibration.output.weight_file import write_weights
from calibration.quantize.two_level import exact_levels, refit
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE, read_index, read_spec
from morphoquant_vllm.format.files import check_regular, open_file, read_json
from morphoquant_vllm.format.layers import (
    GROUP_SCHEME,
    MAX_TWO_LEVEL_CHANNELS,
    TWO_LEVEL_SCHEME,
    input_holder,
    stored_name,
)
from morphoquant_vllm.format.schema import FORMAT_VERSION, QuantizationSpec
from morphoquant_vllm.format.seal import sealed
from morphoquant_vllm.format.verify import verify_checkpoint
from morphoquant_vllm.numerics import weights

# The value of --scales.
TWO_LEVEL = "two-level"


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion, by layer."""

    layers: int
    # Layers whose group scales became two-level exactly.
    exact: tuple[str, ...] = ()
    # Layers whose weights were fitted to two-level scales, with the relative error of the weights.
    errors: Mapping[str, float] = field(default_factory=dict)
    # Layers that keep their group scales, although two-level ones were requested.
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        items = [f"format_version {FORMAT_VERSION}, {self.layers} quantized layers"]
        if self.exact:
            items.append(f"{len(self.exact)} made two-level exactly")
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            mean = sum(self.errors.values()) / len(self.errors)
            items.append(
                f"{len(self.errors)} refitted to two-level scales (relative weight error {mean:.2%} in the mean, "
                f"{self.errors[worst]:.2%} at most, in {worst})"
            )
        if self.left:
            items.append(f"{len(self.left)} left with group scales")
        return ", ".join(items)


def convert(
    directory: Path, output: Path, *, scales: str | None = None, approximate: bool = False, overwrite: bool = False
) -> Conversion:
    """Rewrite the checkpoint `directory` to `output`, in the newest version of the format.

    Weights and files stay byte for byte. With `scales` "two-level", layers get two-level scales if these are exact,
    and with `approximate` the others get the nearest ones. Raises MorphoQuantError for problems that the user can fix.
    After any failure, `output` is as it was before.
    """
    if scales not in (None, TWO_LEVEL):
        raise MorphoQuantError(f"--scales '{scales}' is unknown; known: {TWO_LEVEL}")
    if approximate and scales is None:
        raise MorphoQuantError(f"--approximate needs two-level scales; pass --scales {TWO_LEVEL}, too")
    current = read_spec(directory).integrity is not None
    if current and scales is None:
        raise MorphoQuantError(
            f"{directory}: has format_version {FORMAT_VERSION} already, so there is nothing to do; "
            f"for two-level scales pass --scales {TWO_LEVEL}"
        )
    check_output(output, directory, overwrite=overwrite)
    check_writable(output, "--output", replaced=True)
    spec = verify_checkpoint(directory)
    files = read_index(directory)
    exact, fitted, left = _plan(directory, files, spec, approximate) if scales else ((), (), ())
    if current and not exact and not fitted:
        raise MorphoQuantError(_nothing_to_do(directory, left))
    with only_run(output), staged_directory(output, directory, overwrite=overwrite, tag="convert") as partial:
        copied = _other_files(directory, files)
        sizes = ((directory / path).stat().st_size for path in {*copied, *map(Path, files.values())})
        check_free_space(partial, sum(sizes))
        with explain_write_errors(output, directory):
            for path in copied:
                _copy(directory, path, partial)
            unsealed, errors = _write_weights(directory, partial, files, spec, exact, fitted)
            config = read_json(directory / CONFIG_FILE)
            settings = sealed(partial, config, unsealed)
            # config.json is written last: an incomplete directory does not load.
            write_json(partial / CONFIG_FILE, {**config, "quantization_config": settings.to_dict()})
        # The hashes were just computed from these files; reading them again would only repeat that.
        verify_checkpoint(partial, checksums=False)
    return Conversion(len(spec.linears), exact, errors, left)


def _nothing_to_do(directory: Path, left: Collection[str]) -> str:
    if left:
        return (
            f"{directory}: the group scales of {len(left)} layers are not integer multiples of one scale per output, "
            "so there is nothing to do; --approximate fits the nearest two-level scales"
        )
    return f"{directory}: has two-level scales already, so there is nothing to do"


def _plan(
    directory: Path, files: Mapping[str, str], spec: QuantizationSpec, approximate: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of the layers to convert exactly, of those to refit, and of those to leave.

    Shards that share an input have one scale scheme, and so have the experts of a list: either all change, or none.
    """
    exact: list[str] = []
    fitted: list[str] = []
    left: list[str] = []
    lists = (list(experts.layers(name)) for name, experts in spec.experts.items())
    for names in (*spec.shared_inputs().values(), *lists):
        if spec.linears[names[0]].scale_scheme != GROUP_SCHEME:
            continue
        longest = max(spec.linears[name].in_features for name in names)
        if longest > MAX_TWO_LEVEL_CHANNELS or spec.linears[names[0]].weight_bits == 8:
            left += names
            continue
        other = [name for name in names if exact_levels(_load(directory, files, name, "weight_scale")) is None]
        if other and not approximate:
            left += names
            continue
        fitted += other
        exact += [name for name in names if name not in other]
    return tuple(exact), tuple(fitted), tuple(left)


def _load(directory: Path, files: Mapping[str, str], layer: str, tensor: str) -> Tensor:
    name = stored_name(layer, tensor)
    with open_file(directory / files[name]) as file:
        loaded: Tensor = file.get_tensor(name)
    return loaded


def _other_files(directory: Path, files: Mapping[str, str]) -> list[Path]:
    """Carried files other than weights, index and config.json, relative to the directory; hidden files are excluded."""
    written = {Path(CONFIG_FILE), Path(INDEX_FILE), *map(Path, files.values())}
    paths = (path.relative_to(directory) for path in _files_below(directory, frozenset()))
    return [path for path in paths if path not in written]


def _files_below(folder: Path, around: frozenset[str]) -> Iterator[Path]:
    """Files of a folder and of those below it, by name. Links to folders are followed, but not in a circle."""
    place = os.path.realpath(folder)
    if place in around:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, around | {place})
        else:
            yield path


def _copy(directory: Path, path: Path, target: Path) -> None:
    # A copy of a FIFO in a subfolder would wait for ever.
    check_regular(directory / path)
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory / path, target / path)


def _write_weights(
    directory: Path,
    target: Path,
    files: Mapping[str, str],
    spec: QuantizationSpec,
    exact: Collection[str],
    fitted: Collection[str],
) -> tuple[QuantizationSpec, dict[str, float]]:
    """Write weight files and index; the settings, not sealed yet, and the errors of fitted layers.

    Files without a changed tensor, and the index if no tensor changes its name, are copied.
    """
    changed = {stored_name(name, "weight_scale") for name in (*exact, *fitted)}
    touched = {files[name] for name in changed} | {files[stored_name(name, "weight_codes")] for name in fitted}
    errors: dict[str, float] = {}
    weight_map: dict[str, str] = {}
    for file_name in sorted(set(files.values())):
        if file_name in touched:
            tensors, metadata = _rewritten(directory, files, file_name, changed, fitted, errors)
            write_weights(target / file_name, tensors, metadata)
            weight_map |= dict.fromkeys(tensors, file_name)
        else:
            _copy(directory, Path(file_name), target)
            weight_map |= {name: file_name for name, file in files.items() if file == file_name}
    _write_index(directory, target, weight_map, bool(changed))
    layers = {
        name: replace(layer, scale_scheme=TWO_LEVEL_SCHEME) if stored_name(name, "weight_scale") in changed else layer
        for name, layer in spec.layers.items()
    }
    experts = {
        name: replace(listed, scale_scheme=TWO_LEVEL_SCHEME)
        if stored_name(input_holder(name), "weight_scale") in changed
        else listed
        for name, listed in spec.experts.items()
    }
    return replace(spec, layers=layers, experts=experts, integrity=None), errors


def _rewritten(
    directory: Path,
    files: Mapping[str, str],
    file_name: str,
    changed: Collection[str],
    fitted: Collection[str],
    errors: dict[str, float],
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors of a file in which some scales are `changed` to two-level ones, and the file's metadata."""
    tensors: dict[str, Tensor] = {}
    with open_file(directory / file_name) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            layer, _, tensor = name.rpartition(".")
            if name in changed:
                level, channel_scale = _levels(directory, files, layer, layer in fitted, errors)
                tensors[stored_name(layer, "weight_level")] = level
                tensors[stored_name(layer, "weight_channel_scale")] = channel_scale
            elif tensor == "weight_codes" and layer in fitted:
                tensors[name] = _new_codes(directory, files, layer)
            else:
                tensors[name] = file.get_tensor(name)
        return tensors, file.metadata()


def _levels(
    directory: Path, files: Mapping[str, str], layer: str, is_fitted: bool, errors: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Levels and channel scale of a layer; adds the error of a fitted layer to `errors`."""
    scale = _load(directory, files, layer, "weight_scale")
    if is_fitted:
        codes = weights.unpack(_load(directory, files, layer, "weight_codes"))
        _, level, channel_scale, errors[layer] = refit(codes, scale)
        return level, channel_scale
    levels = exact_levels(scale)
    assert levels is not None, "the plan says that there are exact levels"
    return levels


def _new_codes(directory: Path, files: Mapping[str, str], layer: str) -> Tensor:
    # Codes and scales may be in two files, which are written separately, so a layer is fitted once for each.
    codes = weights.unpack(_load(directory, files, layer, "weight_codes"))
    return weights.pack(refit(codes, _load(directory, files, layer, "weight_scale"))[0])


def _write_index(directory: Path, target: Path, weight_map: Mapping[str, str], is_changed: bool) -> None:
    if not is_changed:
        _copy(directory, Path(INDEX_FILE), target)
        return
    index = read_json(directory / INDEX_FILE)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        # The tensors' bytes, without headers.
        sizes = [path.stat().st_size - _header_bytes(path) for path in map(target.joinpath, set(weight_map.values()))]
        index["metadata"] = {**metadata, "total_size": sum(sizes)}
    write_json(target / INDEX_FILE, {**index, "weight_map": dict(sorted(weight_map.items()))})


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
