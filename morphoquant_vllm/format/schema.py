"""quantization_config as a whole: its fields, its rows and their rules. Exporter and plugin both import this.

docs/reference/format.md explains the format; this module and layers.py are authoritative. They need torch only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.integrity import Integrity, digest
from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.format.layers import (
    INPUT_TENSORS,
    ExpertsSpec,
    LayerSpec,
    TensorSpec,
    input_holder,
    tensor_specs,
)

QUANT_METHOD = "morphoquant"
# This version writes FORMAT_VERSION and reads KNOWN_VERSIONS. Version 2 has no `integrity`: less can be checked.
FORMAT_VERSION = 3
KNOWN_VERSIONS = (2, 3)
ANY_ROW = "any"
TEXT_ROW = "text"
# The list of row names is open and starts with these. Placeholders of a modality map to the row of the same name.
# The last row serves massive tokens, which the quantizer recognises by value.
MASSIVE_ROW = "massive"
DEFAULT_ROWS = (TEXT_ROW, "image", "video", "audio", ANY_ROW, MASSIVE_ROW)
OPTIONAL_FIELDS = ("created_by", "experts", "kv_cache")
# Names of layers and rows come from files and are shown in terminals and pages, so they are plain and short.
_NAME = re.compile(r"[\w.\-]{1,200}", re.ASCII)

# Token ids are below this: they are int32.
_TOKENS = 2**31
# Settings that the shards of a fused layer have in common.
SHARED_SETTINGS = ("in_features", "group_size", "scale_scheme", "parallel", "fixed_row", "weight_bits")


@dataclass(frozen=True)
class QuantizationSpec:
    """The quantization_config of a checkpoint."""

    layers: dict[str, LayerSpec]
    rows: tuple[str, ...] = DEFAULT_ROWS
    # Channel orders of row-parallel layers stay within this many equal blocks of K; serving sizes must divide it.
    tensor_parallel: int = 1
    # Token ids that stand for a modality in input_ids, by row name.
    placeholder_token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # Free text about the program that made the file; never interpreted. (vLLM uses the name "producer" for a format
    # of its own.)
    created_by: str = ""
    # Content of the whole checkpoint; None in version 2, and before a checkpoint is written.
    integrity: Integrity | None = None
    # Routed experts by the name of their list; the linears of these are not in `layers`.
    experts: dict[str, ExpertsSpec] = field(default_factory=dict)
    # Largest queries, keys and values by decoder block; blocks without attention that was seen are absent.
    kv_cache: dict[str, AttentionRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shared = (layer.shared_input for layer in self.layers.values() if type(layer.shared_input) is str)
        for name in (*self.rows, *self.layers, *self.experts, *self.kv_cache, *shared):
            if type(name) is not str or not _NAME.fullmatch(name):
                raise MorphoQuantError(
                    f"quantization_config: {name!r} is not a name of a row or layer; copy config.json again"
                )
        if ANY_ROW not in self.rows or len(set(self.rows)) != len(self.rows):
            raise MorphoQuantError(f"quantization_config: rows must be distinct and hold '{ANY_ROW}', got {self.rows}")
        if self.rows[-1] != MASSIVE_ROW:
            raise MorphoQuantError(f"quantization_config: the last row must be '{MASSIVE_ROW}', got {self.rows}")
        if self.tensor_parallel < 1:
            raise MorphoQuantError(
                f"quantization_config: tensor_parallel must be 1 or more, got {self.tensor_parallel}"
            )
        if not self.layers and not self.experts:
            raise MorphoQuantError("quantization_config: no quantized layer is listed under 'layers'")
        self._check_placeholders()
        self._check_experts()
        for block, magnitudes in self.kv_cache.items():
            magnitudes.check(block)
        for name, layer in self.layers.items():
            layer.check(name, self.tensor_parallel)
            if layer.fixed_row and layer.fixed_row not in self.rows[:-1]:
                raise MorphoQuantError(
                    f"{name}: fixed_row '{layer.fixed_row}' is not a modality's row; known: {list(self.rows[:-1])}"
                )
        for group, names in self.shared_inputs().items():
            first = self.layers[names[0]]
            for name in names[1:]:
                layer = self.layers[name]
                if any(getattr(layer, setting) != getattr(first, setting) for setting in SHARED_SETTINGS):
                    raise MorphoQuantError(f"{name}: shards of {group} must share {', '.join(SHARED_SETTINGS)}")

    def _check_placeholders(self) -> None:
        row_of: dict[int, str] = {}
        for row, ids in self.placeholder_token_ids.items():
            if row not in self.rows[:-1]:
                raise MorphoQuantError(
                    f"quantization_config: placeholder_token_ids names an unknown row '{row}'; known: "
                    f"{list(self.rows[:-1])}"
                )
            for token in ids:
                if not 0 <= token < _TOKENS or token in row_of:
                    problem = f"is in '{row_of[token]}' too" if token in row_of else "is no token id"
                    raise MorphoQuantError(
                        f"quantization_config: placeholder_token_ids has token {token} in '{row}', but it {problem}; "
                        "calibrate again"
                    )
                row_of[token] = row

    def _check_experts(self) -> None:
        for name, experts in self.experts.items():
            experts.check(name, self.tensor_parallel)
            inside = [layer for layer in (*self.layers, *self.experts) if layer.startswith(f"{name}.")]
            if name in self.layers or inside:
                raise MorphoQuantError(
                    f"quantization_config: {(inside or [name])[0]} is listed, and so is {name} under 'experts', which "
                    "holds it; copy config.json again"
                )

    @cached_property
    def linears(self) -> dict[str, LayerSpec]:
        """All quantized linears: `layers`, and then those of every expert."""
        of_experts = (experts.layers(name) for name, experts in self.experts.items())
        return {**self.layers, **{name: layer for layers in of_experts for name, layer in layers.items()}}

    def stored_tensors(self, name: str) -> dict[str, TensorSpec]:
        """The tensors that the checkpoint stores below a linear, except the source layer's bias.

        The input of gate_proj and up_proj of a list of experts is stored once, below `input_holder`.
        """
        layer = self.linears[name]
        specs = tensor_specs(layer, len(self.rows), self.tensor_parallel)
        if name in self.layers or layer.parallel == "row":
            return specs
        experts = layer.shared_input.rpartition(".")[0]
        return specs if name == input_holder(experts) else {t: s for t, s in specs.items() if t not in INPUT_TENSORS}

    @property
    def any_row(self) -> int:
        """Index of the row that serves tokens of unknown modality."""
        return self.rows.index(ANY_ROW)

    def shared_inputs(self) -> dict[str, list[str]]:
        """Names in `layers` by the input that they share, in the order of the file."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(layer.shared_input, []).append(name)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        integrity = {} if self.integrity is None else {"integrity": self.integrity.to_dict()}
        return {**self._settings(), **integrity}

    def settings_digest(self) -> str:
        """The expected `integrity.settings`: a digest of the other settings, except the free text."""
        return digest({**self._settings(), "format_version": FORMAT_VERSION, "created_by": ""})

    def _settings(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION if self.integrity is not None else KNOWN_VERSIONS[0],
            "created_by": self.created_by,
            "rows": list(self.rows),
            "tensor_parallel": self.tensor_parallel,
            "placeholder_token_ids": {row: list(ids) for row, ids in self.placeholder_token_ids.items()},
            "layers": {name: _settings(layer) for name, layer in self.layers.items()},
            # Left out if empty: a checkpoint without experts keeps its digest.
            **({"experts": {name: asdict(experts) for name, experts in self.experts.items()}} if self.experts else {}),
            **({"kv_cache": {name: asdict(found) for name, found in self.kv_cache.items()}} if self.kv_cache else {}),
        }

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> QuantizationSpec:
        """Parse and check a quantization_config; MorphoQuantError if this version cannot read it."""
        if config.get("quant_method") != QUANT_METHOD:
            raise MorphoQuantError(
                f"quantization_config: quant_method is {config.get('quant_method')!r}, not '{QUANT_METHOD}'; "
                "make a MorphoQuant checkpoint with `morphoquant calibrate`"
            )
        version = config.get("format_version")
        if type(version) is not int or version not in KNOWN_VERSIONS:
            raise MorphoQuantError(
                f"quantization_config: format_version {version!r} is unknown; this version of morphoquant-vllm "
                f"knows {' and '.join(map(str, KNOWN_VERSIONS))}: upgrade it, or calibrate again"
            )
        _check_fields(config, version)
        try:
            spec = _parse(config)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise MorphoQuantError(f"quantization_config is malformed: {error!r}; calibrate again") from error
        if spec.integrity is not None and spec.integrity.settings != spec.settings_digest():
            raise MorphoQuantError(
                "quantization_config: its settings changed after the checkpoint was made; copy config.json again"
            )
        return spec


def _check_fields(config: Mapping[str, Any], version: int) -> None:
    """Refuse unknown fields by name."""
    needed = {"quant_method", "format_version", "rows", "tensor_parallel", "placeholder_token_ids", "layers"}
    if version == FORMAT_VERSION:
        needed.add("integrity")
        unknown = config.keys() - needed - {*OPTIONAL_FIELDS}
    else:
        # Loaders of version 2 ignored unknown fields. Settings that are not sealed yet have this version, and may have
        # experts and kv_cache.
        unknown = config.keys() & {"integrity"}
    for name in sorted(needed - config.keys()):
        raise MorphoQuantError(f"quantization_config: {name} is missing; copy config.json again")
    for name in sorted(map(str, unknown)):
        raise MorphoQuantError(
            f"quantization_config: {name} is unknown in format_version {version}; upgrade morphoquant-vllm, or copy "
            "config.json again"
        )


def _parse(config: Mapping[str, Any]) -> QuantizationSpec:
    if not isinstance(config["rows"], list):
        raise TypeError("rows must be a list")
    integrity = Integrity.from_dict(config["integrity"]) if "integrity" in config else None
    return QuantizationSpec(
        layers={name: LayerSpec(**layer) for name, layer in config["layers"].items()},
        rows=tuple(config["rows"]),
        tensor_parallel=_whole(config["tensor_parallel"], "tensor_parallel"),
        placeholder_token_ids={
            str(row): tuple(_whole(token, "placeholder_token_ids") for token in ids)
            for row, ids in config["placeholder_token_ids"].items()
        },
        created_by=str(config.get("created_by", "")),
        integrity=integrity,
        experts={name: ExpertsSpec(**experts) for name, experts in (config.get("experts") or {}).items()},
        kv_cache={name: AttentionRange(**found) for name, found in (config.get("kv_cache") or {}).items()},
    )


def _whole(value: Any, name: str) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    return value


# Settings of a layer that config.json holds only if they differ from the default: older files lack them.
_OPTIONAL = {"fixed_row": "", "weight_bits": 4}


def _settings(layer: LayerSpec) -> dict[str, Any]:
    """A layer's entry in config.json."""
    settings = asdict(layer)
    return {name: value for name, value in settings.items() if name not in _OPTIONAL or value != _OPTIONAL[name]}
