"""The checkpoint format: names, shapes, dtypes and rules. Exporter and plugin both import this; it needs torch only.

docs/checkpoint.md explains the format; this module is what holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES, MAX_LEVEL

QUANT_METHOD = "morphoquant"
FORMAT_VERSION = 2
ANY_ROW = "any"
TEXT_ROW = "text"
# The open list of row names starts with these; placeholders of a model's modality map to the row of the same name.
# The last row serves massive tokens, which the quantizer knows by their values.
MASSIVE_ROW = "massive"
DEFAULT_ROWS = (TEXT_ROW, "image", "video", "audio", ANY_ROW, MASSIVE_ROW)
# Intervals of a set by which a massive token is known.
MASSIVE_CHANNELS = 4
# How the scales of a layer's groups of weights are stored: each by itself, or as whole multiples of one per output.
GROUP_SCHEME, TWO_LEVEL_SCHEME = "group", "two_level"
SCALE_SCHEMES = (GROUP_SCHEME, TWO_LEVEL_SCHEME)
# Input channels up to which the int32 sum of level * q * code over all of them is exact: 128 * 128 * K < 2^31.
MAX_TWO_LEVEL_CHANNELS = 2**17 - 1
PARALLEL_KINDS = ("column", "row")

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
}

# Settings that the shards of a fused layer have in common.
SHARED_SETTINGS = ("in_features", "group_size", "scale_scheme", "parallel", "fixed_row")

# Tensors that every shard of a fused layer must carry with the same bytes: they belong to the shared input.
INPUT_TENSORS = (
    *("activation_step", "channel_order", "modality_mask", "centre", "gain"),
    *("massive_channel", "massive_low", "massive_high"),
)
# Tensors of one shard's own outputs, by scale scheme, in the order of numerics.linear.weight_record's arguments.
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
    """Settings of one quantized linear, as they stand in quantization_config.layers under its HF name."""

    in_features: int
    out_features: int
    group_size: int
    # "row" where tensor parallelism splits K (o_proj, down_proj), else "column".
    parallel: str
    # Name of the fused layer that shares this layer's input, e.g. "model.layers.0.self_attn.qkv_proj"; else its own.
    shared_input: str
    # Whether the source layer has a bias of its own, carried over as `<layer>.bias`.
    bias: bool = False
    scale_scheme: str = GROUP_SCHEME
    # Row of every token of this layer, for towers, whose tokens have no ids; empty: the row of the token's modality.
    fixed_row: str = ""

    def check(self, name: str, tensor_parallel: int = 1) -> None:
        """Raise MorphoQuantError naming the layer where a rule of the format is broken."""
        for setting, wanted in FIELD_TYPES.items():
            # type(), not isinstance(): JSON's true is no number.
            if type(getattr(self, setting)) is not wanted:
                raise MorphoQuantError(f"{name}: {setting} must be {wanted.__name__}, got {getattr(self, setting)!r}")
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
    """Refuse a group size that the format does not know, or that does not divide K."""
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
class QuantizationSpec:
    """The quantization_config of a checkpoint."""

    layers: dict[str, LayerSpec]
    rows: tuple[str, ...] = DEFAULT_ROWS
    # Channel orders of row-parallel layers stay within this many equal blocks of K; serving sizes must divide it.
    tensor_parallel: int = 1
    # Token ids that stand for a modality in input_ids, by row name.
    placeholder_token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # Free text about what made the file; never interpreted (vLLM claims the name "producer" for a format of its own).
    created_by: str = ""

    def __post_init__(self) -> None:
        if ANY_ROW not in self.rows or len(set(self.rows)) != len(self.rows):
            raise MorphoQuantError(f"quantization_config: rows must be distinct and hold '{ANY_ROW}', got {self.rows}")
        if self.rows[-1] != MASSIVE_ROW:
            raise MorphoQuantError(f"quantization_config: the last row must be '{MASSIVE_ROW}', got {self.rows}")
        if self.tensor_parallel < 1:
            raise MorphoQuantError(
                f"quantization_config: tensor_parallel must be 1 or more, got {self.tensor_parallel}"
            )
        if not self.layers:
            raise MorphoQuantError("quantization_config: no quantized layer is listed under 'layers'")
        self._check_placeholders()
        for name, layer in self.layers.items():
            layer.check(name, self.tensor_parallel)
            if layer.fixed_row and layer.fixed_row not in self.rows[:-1]:
                raise MorphoQuantError(
                    f"{name}: fixed_row '{layer.fixed_row}' is no modality's row; known: {list(self.rows[:-1])}"
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
                    what = f"is in '{row_of[token]}' too" if token in row_of else "is negative"
                    raise MorphoQuantError(
                        f"quantization_config: placeholder_token_ids has token {token} in '{row}', but it {what}; "
                        "calibrate again"
                    )
                row_of[token] = row

    @property
    def any_row(self) -> int:
        """Index of the row that serves tokens of unknown modality."""
        return self.rows.index(ANY_ROW)

    def shared_inputs(self) -> dict[str, list[str]]:
        """Layer names by the input they share, in the order of the file."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(layer.shared_input, []).append(name)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "created_by": self.created_by,
            "rows": list(self.rows),
            "tensor_parallel": self.tensor_parallel,
            "placeholder_token_ids": {row: list(ids) for row, ids in self.placeholder_token_ids.items()},
            "layers": {name: _settings(layer) for name, layer in self.layers.items()},
        }

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> QuantizationSpec:
        """Parse and check a quantization_config; MorphoQuantError where it is not one this version knows."""
        if config.get("quant_method") != QUANT_METHOD:
            raise MorphoQuantError(
                f"quantization_config: quant_method is {config.get('quant_method')!r}, not '{QUANT_METHOD}'; "
                "make a MorphoQuant checkpoint with `morphoquant calibrate`"
            )
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise MorphoQuantError(
                f"quantization_config: format_version {version!r} is unknown; this version of morphoquant-vllm "
                f"knows {FORMAT_VERSION}: upgrade it, or calibrate again"
            )
        try:
            layers = {str(name): LayerSpec(**layer) for name, layer in config["layers"].items()}
            return QuantizationSpec(
                layers=layers,
                rows=tuple(config["rows"]),
                tensor_parallel=int(config["tensor_parallel"]),
                placeholder_token_ids={
                    str(row): tuple(int(token) for token in ids) for row, ids in config["placeholder_token_ids"].items()
                },
                created_by=str(config.get("created_by", "")),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise MorphoQuantError(f"quantization_config is malformed: {error!r}; calibrate again") from error


def _settings(layer: LayerSpec) -> dict[str, Any]:
    """A layer's entry in config.json; `fixed_row` stands only where there is one."""
    settings = asdict(layer)
    return settings if layer.fixed_row else {name: settings[name] for name in settings if name != "fixed_row"}


def input_blocks(layer: LayerSpec, tensor_parallel: int) -> int:
    """Blocks of K that may lie on ranks of their own: what is summed over ranks is stored per block."""
    return tensor_parallel if layer.parallel == "row" else 1


def tensor_specs(layer: LayerSpec, rows: int, tensor_parallel: int) -> dict[str, TensorSpec]:
    """Every tensor of one quantized linear by its name below the layer; the layer's own bias is not among them.

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


def check_values(name: str, tensors: Mapping[str, torch.Tensor], any_row: int, *, parallel: str, blocks: int) -> None:
    """Raise MorphoQuantError naming the layer and tensor where values break a rule of the format.

    `tensors` are one layer's, already of the right shapes; `blocks` is the checkpoint's tensor_parallel.
    """
    two_level = scale_scheme_of(tensors) == TWO_LEVEL_SCHEME
    scale = "weight_channel_scale" if two_level else "weight_scale"
    finite = (scale, "activation_step", "centre", "gain", "massive_low", "massive_high", "absorbed_bias")
    for tensor in finite:
        if not bool(torch.isfinite(tensors[tensor]).all()):
            raise MorphoQuantError(f"{name}.{tensor}: holds NaN or infinite values; the file is damaged")
    for tensor in (scale, "activation_step", "gain"):
        if not bool((tensors[tensor] > 0).all()):
            raise MorphoQuantError(f"{name}.{tensor}: every value must be positive; the file is damaged")
    if two_level:
        level = tensors["weight_level"]
        if not bool(((level >= 1) & (level <= MAX_LEVEL)).all()):
            raise MorphoQuantError(f"{name}.weight_level: every level must be 1 to {MAX_LEVEL}; the file is damaged")
    inverse = 1.0 / (tensors["activation_step"].double()[None] * tensors["gain"].double()[:, None])
    if float(inverse.max()) > torch.finfo(torch.float32).max:
        raise MorphoQuantError(f"{name}.activation_step: a step is too small to invert in float32")
    mask = tensors["modality_mask"]
    # The massive row stands apart: the quantizer itself knows its tokens.
    if bool((mask[:-1] & ~mask[any_row]).any()):
        raise MorphoQuantError(f"{name}.modality_mask: row '{ANY_ROW}' must hold the channels of every modality's row")
    check_massive_channels(name, tensors["massive_channel"], tensors["channel_order"].numel())
    check_order(name, tensors["channel_order"], blocks if parallel == "row" else 1)


def check_massive_channels(name: str, channel: torch.Tensor, in_features: int) -> None:
    """Each block's massive channels [B, J] must lie in that block of the K channels."""
    width = in_features // channel.shape[0]
    start = torch.arange(channel.shape[0], device=channel.device)[:, None] * width
    if bool(((channel < start) | (channel >= start + width)).any()):
        raise MorphoQuantError(f"{name}.massive_channel: a channel lies outside its block of {width} channels")


def check_order(name: str, order: torch.Tensor, blocks: int) -> None:
    """The channel order [K] must be a permutation that stays within each of `blocks` equal blocks."""
    expected = torch.arange(order.numel(), device=order.device).view(blocks, -1)
    if not torch.equal(order.long().view(blocks, -1).sort(dim=1).values, expected):
        where = f"within {blocks} tensor-parallel blocks " if blocks > 1 else ""
        raise MorphoQuantError(f"{name}.channel_order: must permute the {order.numel()} channels {where}exactly once")


def unequal_input_tensors(
    reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names: Sequence[str] = INPUT_TENSORS
) -> list[str]:
    """Which of the shared-input tensors differ between two shards of a fused layer."""
    return [name for name in names if not torch.equal(reference[name], other[name])]
