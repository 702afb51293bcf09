"""The checkpoint format: names, shapes, dtypes and rules. Exporter and plugin both import this; it needs torch only.

docs/reference/format.md explains the format; this module is authoritative.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.integrity import Integrity, digest
from morphoquant_vllm.numerics.limits import GROUP_SIZES

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
# Number of channel intervals that identify a massive token.
MASSIVE_CHANNELS = 4
# Storage of a layer's weight scales: one per group, or integer multiples of one scale per output channel.
GROUP_SCHEME, TWO_LEVEL_SCHEME = "group", "two_level"
SCALE_SCHEMES = (GROUP_SCHEME, TWO_LEVEL_SCHEME)
# Most input channels for which the int32 sum of level * q * code over all of them is exact: 128 * 128 * K < 2^31.
MAX_TWO_LEVEL_CHANNELS = 2**17 - 1
PARALLEL_KINDS = ("column", "row")
# Bits of a weight code. The format has room for 8; a version that serves them will list them here.
WEIGHT_BITS = (4,)
# Settings that later versions of this package may fill without a new format version. Here they must be empty.
RESERVED = ("kv_cache",)
OPTIONAL_FIELDS = ("created_by", "experts")
# Most experts of one layer. A damaged count must not exhaust the memory.
MAX_EXPERTS = 4096
# Names of layers and rows come from files and are shown in terminals and pages, so they are plain and short.
_NAME = re.compile(r"[\w.\-]{1,200}", re.ASCII)

# JSON types of a layer's settings.
FIELD_TYPES = {
    "in_features": int,
    "out_features": int,
    "group_size": int,
    "parallel": str,
    "shared_input": str,
    "bias": bool,
    "scale_scheme": str,
    "fixed_row": str,
    "weight_bits": int,
}

# Settings that the shards of a fused layer have in common.
SHARED_SETTINGS = ("in_features", "group_size", "scale_scheme", "parallel", "fixed_row", "weight_bits")

# Tensors of the shared input: every shard of a fused layer must carry the same bytes.
INPUT_TENSORS = (
    *("activation_step", "channel_order", "modality_mask", "centre", "gain"),
    *("massive_channel", "massive_low", "massive_high"),
)
# Tensors of one shard's outputs, by scale scheme, in the order of numerics.linear.weight_record's arguments.
OUTPUT_TENSORS = {
    GROUP_SCHEME: ("weight_codes", "weight_scale", "absorbed_bias"),
    TWO_LEVEL_SCHEME: ("weight_codes", "weight_level", "absorbed_bias", "weight_channel_scale"),
}


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """Settings of one quantized linear: its entry in quantization_config.layers under its HF name."""

    in_features: int
    out_features: int
    group_size: int
    # "row" if tensor parallelism splits K (o_proj, down_proj), else "column".
    parallel: str
    # Name of the fused layer that shares this layer's input, e.g. "model.layers.0.self_attn.qkv_proj"; else the
    # layer's name.
    shared_input: str
    # Whether the source layer has a bias, carried over as `<layer>.bias`.
    bias: bool = False
    scale_scheme: str = GROUP_SCHEME
    # Row of every token of this layer, for towers, whose tokens have no ids. Empty: the row of the token's modality.
    fixed_row: str = ""
    # Bits of a weight code.
    weight_bits: int = 4

    def check(self, name: str, tensor_parallel: int = 1) -> None:
        """Raise MorphoQuantError naming the layer if a rule of the format is broken."""
        for setting, wanted in FIELD_TYPES.items():
            # type(), not isinstance(): JSON's true is not a number.
            if type(getattr(self, setting)) is not wanted:
                raise MorphoQuantError(f"{name}: {setting} must be {wanted.__name__}, got {getattr(self, setting)!r}")
        if self.weight_bits not in WEIGHT_BITS:
            raise MorphoQuantError(
                f"{name}: weight_bits {self.weight_bits} is not served by this version, which serves "
                f"{list(WEIGHT_BITS)}; upgrade morphoquant-vllm"
            )
        if self.scale_scheme not in SCALE_SCHEMES:
            raise MorphoQuantError(
                f"{name}: scale_scheme '{self.scale_scheme}' is unknown; this version knows {list(SCALE_SCHEMES)}"
            )
        if self.parallel not in PARALLEL_KINDS:
            raise MorphoQuantError(f"{name}: parallel '{self.parallel}' is unknown; known: {list(PARALLEL_KINDS)}")
        if self.in_features <= 0 or self.out_features <= 0:
            raise MorphoQuantError(f"{name}: in_features and out_features must be positive")
        check_group_size(name, self.in_features, self.group_size)
        if self.scale_scheme == TWO_LEVEL_SCHEME and self.in_features > MAX_TWO_LEVEL_CHANNELS:
            raise MorphoQuantError(
                f"{name}: K = {self.in_features} is over {MAX_TWO_LEVEL_CHANNELS}, up to which the sums of two-level "
                f"scales are exact in int32; use scale_scheme '{GROUP_SCHEME}' for this layer"
            )
        if self.parallel == "row":
            check_tensor_parallel(name, self.in_features, self.group_size, tensor_parallel)


def check_group_size(name: str, in_features: int, group_size: int) -> None:
    """Refuse a group size that the format does not list, or that does not divide K."""
    if group_size not in GROUP_SIZES:
        raise MorphoQuantError(f"{name}: group_size {group_size} is not one of {list(GROUP_SIZES)}")
    if in_features % group_size:
        allowed = [size for size in GROUP_SIZES if in_features % size == 0]
        remedy = f"choose group_size from {allowed}" if allowed else "leave this layer in 16 bit (ignore it)"
        raise MorphoQuantError(f"{name}: K = {in_features} is not divisible by group_size {group_size}; {remedy}")


def allowed_tensor_parallel(in_features: int, group_size: int, limit: int = 64) -> list[int]:
    """The tensor-parallel sizes up to `limit` that cut K into whole groups."""
    return [size for size in range(1, limit + 1) if in_features % (size * group_size) == 0]


def check_tensor_parallel(name: str, in_features: int, group_size: int, size: int) -> None:
    """Refuse a tensor-parallel size that would break a group of a row-parallel layer."""
    if size < 1 or in_features % (size * group_size):
        raise MorphoQuantError(
            f"{name}: tensor parallel size {size} breaks a group (K = {in_features}, group_size {group_size}); "
            f"allowed sizes: {allowed_tensor_parallel(in_features, group_size)}"
        )


@dataclass(frozen=True)
class ExpertsSpec:
    """Settings of the routed experts of one layer: their entry in quantization_config.experts.

    Its name is that of the list of experts, e.g. "model.layers.0.mlp.experts". An expert is silu(gate_proj) * up_proj
    and down_proj, without biases.
    """

    count: int
    # K of gate_proj and up_proj, and N of down_proj.
    in_features: int
    # N of gate_proj and up_proj, and K of down_proj.
    intermediate_features: int
    group_size: int
    scale_scheme: str = GROUP_SCHEME

    def check(self, name: str, tensor_parallel: int = 1) -> None:
        """Raise MorphoQuantError naming the experts if a rule of the format is broken."""
        for setting in ("count", "in_features", "intermediate_features"):
            if type(getattr(self, setting)) is not int:
                raise MorphoQuantError(f"{name}: {setting} must be int, got {getattr(self, setting)!r}")
        if not 1 <= self.count <= MAX_EXPERTS:
            raise MorphoQuantError(f"{name}: count must be 1 to {MAX_EXPERTS} experts, got {self.count}")
        for layer_name, layer in self.expert_layers(name, 0).items():
            layer.check(layer_name, tensor_parallel)

    def layers(self, name: str) -> dict[str, LayerSpec]:
        """Settings of the linears of all experts of the list `name`, as of ordinary layers."""
        return {
            layer: settings
            for index in range(self.count)
            for layer, settings in self.expert_layers(name, index).items()
        }

    def expert_layers(self, name: str, index: int) -> dict[str, LayerSpec]:
        """Settings of gate_proj, up_proj and down_proj of one expert of the list `name`."""
        gate_up = LayerSpec(
            in_features=self.in_features,
            out_features=self.intermediate_features,
            group_size=self.group_size,
            parallel="column",
            shared_input=experts_input(name),
            scale_scheme=self.scale_scheme,
        )
        down = LayerSpec(
            in_features=self.intermediate_features,
            out_features=self.in_features,
            group_size=self.group_size,
            parallel="row",
            shared_input=f"{name}.{index}.down_proj",
            scale_scheme=self.scale_scheme,
        )
        return {
            f"{name}.{index}.gate_proj": gate_up,
            f"{name}.{index}.up_proj": gate_up,
            f"{name}.{index}.down_proj": down,
        }


def experts_input(name: str) -> str:
    """The name of the input that gate_proj and up_proj of all experts of the list `name` share."""
    return f"{name}.gate_up_proj"


def input_holder(experts: str) -> str:
    """The one layer of a list of experts that stores the tensors of the input of gate_proj and up_proj."""
    return f"{experts}.0.gate_proj"


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

    def __post_init__(self) -> None:
        shared = (layer.shared_input for layer in self.layers.values() if type(layer.shared_input) is str)
        for name in (*self.rows, *self.layers, *self.experts, *shared):
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
                if token < 0 or token in row_of:
                    problem = f"is in '{row_of[token]}' too" if token in row_of else "is negative"
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
        unknown = config.keys() - needed - {*OPTIONAL_FIELDS, *RESERVED}
    else:
        # Loaders of version 2 ignored unknown fields. Settings that are not sealed yet have this version, and may have
        # experts.
        unknown = config.keys() & {"integrity", *RESERVED}
    for name in sorted(needed - config.keys()):
        raise MorphoQuantError(f"quantization_config: {name} is missing; copy config.json again")
    for name in sorted(map(str, unknown)):
        raise MorphoQuantError(
            f"quantization_config: {name} is unknown in format_version {version}; upgrade morphoquant-vllm, or copy "
            "config.json again"
        )
    for name in RESERVED:
        if config.get(name):
            raise MorphoQuantError(f"quantization_config: {name} needs a newer morphoquant-vllm; upgrade it")


def _parse(config: Mapping[str, Any]) -> QuantizationSpec:
    if not isinstance(config["rows"], list):
        raise TypeError("rows must be a list")
    integrity = config.get("integrity")
    return QuantizationSpec(
        layers={name: LayerSpec(**layer) for name, layer in config["layers"].items()},
        rows=tuple(config["rows"]),
        tensor_parallel=_whole(config["tensor_parallel"], "tensor_parallel"),
        placeholder_token_ids={
            str(row): tuple(_whole(token, "placeholder_token_ids") for token in ids)
            for row, ids in config["placeholder_token_ids"].items()
        },
        created_by=str(config.get("created_by", "")),
        integrity=None if integrity is None else Integrity.from_dict(integrity),
        experts={name: ExpertsSpec(**experts) for name, experts in (config.get("experts") or {}).items()},
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


def input_blocks(layer: LayerSpec, tensor_parallel: int) -> int:
    """Number of blocks of K that may lie on different ranks; tensors summed over ranks are stored per block."""
    return tensor_parallel if layer.parallel == "row" else 1


def tensor_specs(layer: LayerSpec, rows: int, tensor_parallel: int) -> dict[str, TensorSpec]:
    """Every tensor of one quantized linear by its name below the layer, except the source layer's bias.

    `tensor_parallel` is the checkpoint's.
    """
    k, n, groups = layer.in_features, layer.out_features, layer.in_features // layer.group_size
    blocks = input_blocks(layer, tensor_parallel)
    scales = {"weight_scale": TensorSpec(torch.bfloat16, (n, groups))}
    if layer.scale_scheme == TWO_LEVEL_SCHEME:
        scales = {
            "weight_level": TensorSpec(torch.uint8, (n, groups)),
            "weight_channel_scale": TensorSpec(torch.float32, (n,)),
        }
    return {
        "weight_codes": TensorSpec(torch.uint8, (n, k // 2)),
        **scales,
        "activation_step": TensorSpec(torch.float32, (k,)),
        "channel_order": TensorSpec(torch.int32, (k,)),
        "modality_mask": TensorSpec(torch.bool, (rows, k)),
        "centre": TensorSpec(torch.float32, (rows, k)),
        "gain": TensorSpec(torch.float32, (rows,)),
        "massive_channel": TensorSpec(torch.int32, (blocks, MASSIVE_CHANNELS)),
        "massive_low": TensorSpec(torch.float32, (blocks, MASSIVE_CHANNELS)),
        "massive_high": TensorSpec(torch.float32, (blocks, MASSIVE_CHANNELS)),
        "absorbed_bias": TensorSpec(torch.float32, (blocks, rows, n)),
    }


def scale_scheme_of(tensors: Collection[str]) -> str:
    """The scheme of a layer's tensors, by their names."""
    return TWO_LEVEL_SCHEME if "weight_level" in tensors else GROUP_SCHEME


def stored_name(layer: str, tensor: str) -> str:
    """Name of a tensor in the safetensors files."""
    return f"{layer}.{tensor}"
