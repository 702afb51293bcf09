"""Settings of a quantized linear and of a list of experts, and the tensors that each stores. Needs torch only.

docs/reference/format.md explains the format; this module and schema.py are authoritative.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES

# Number of channel intervals that identify a massive token.
MASSIVE_CHANNELS = 4
# Storage of a layer's weight scales: one per group, or integer multiples of one scale per output channel.
GROUP_SCHEME, TWO_LEVEL_SCHEME = "group", "two_level"
SCALE_SCHEMES = (GROUP_SCHEME, TWO_LEVEL_SCHEME)
# Most input channels for which the int32 sum of level * q * code over all of them is exact: 128 * 128 * K < 2^31.
MAX_TWO_LEVEL_CHANNELS = 2**17 - 1
PARALLEL_KINDS = ("column", "row")
# Bits of a weight code: two codes to a byte, or one.
WEIGHT_BITS = (4, 8)
# Most experts of one layer. A damaged count must not exhaust the memory.
MAX_EXPERTS = 4096

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
        if self.weight_bits == 8 and self.scale_scheme != GROUP_SCHEME:
            raise MorphoQuantError(
                f"{name}: weight_bits 8 goes with scale_scheme '{GROUP_SCHEME}' alone, since int32 does not hold the "
                "sums of levels times 8-bit weights; calibrate again"
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
        "weight_codes": TensorSpec(*((torch.int8, (n, k)) if layer.weight_bits == 8 else (torch.uint8, (n, k // 2)))),
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
