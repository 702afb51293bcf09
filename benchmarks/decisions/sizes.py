"""Bytes of a checkpoint's tensors by purpose, at a 7B model's shapes, from the format's table."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.models.shapes import linears
from morphoquant_vllm.format.layers import LayerSpec, TensorSpec, tensor_specs
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from morphoquant_vllm.numerics.limits import GROUP_SIZES

# Qwen2.5-7B: 28 heads of 128, 4 of them for keys and values; [N, K] of every linear of a decoder block.
TENSOR_PARALLEL = 4
SHAPES = {linear.name: (linear.outputs, linear.channels) for linear in linears("Qwen2.5-7B")}
# Tensors of a row of the checkpoint.
ROW_TENSORS = ("centre", "modality_mask", "gain", "absorbed_bias")
MASSIVE_TENSORS = ("massive_channel", "massive_low", "massive_high")
# schema.RESERVED_SCALE_SCHEMES: a byte per group and a float32 per output channel.
LEVEL_BYTES, CHANNEL_SCALE_BYTES = 1, 4


def layer_bytes(layer: LayerSpec, tensor_parallel: int = TENSOR_PARALLEL) -> dict[str, int]:
    """Bytes of one linear by purpose, rows "text" and "massive" apart from the other rows; "total" as stored."""
    sizes = {name: _bytes(spec) for name, spec in tensor_specs(layer, len(DEFAULT_ROWS), tensor_parallel).items()}
    row = sum(sizes[name] for name in ROW_TENSORS) // len(DEFAULT_ROWS)
    groups = layer.in_features // layer.group_size
    return {
        "weight_codes": sizes["weight_codes"],
        "weight_scale": sizes["weight_scale"],
        "two_level_scale": layer.out_features * (groups * LEVEL_BYTES + CHANNEL_SCALE_BYTES),
        "step_and_order": sizes["activation_step"] + sizes["channel_order"],
        "one_row": row,
        "other_rows": row * (len(DEFAULT_ROWS) - 2),
        # Its row, and the intervals by which its tokens are known.
        "massive": row + sum(sizes[name] for name in MASSIVE_TENSORS),
        "total": sum(sizes.values()),
        "sixteen_bit": 2 * layer.in_features * layer.out_features,
    }


def block_bytes(group_size: int) -> dict[str, Any]:
    """Bytes of every linear of a decoder block by purpose, and of all together."""
    layers = {name: layer_bytes(LayerSpec(k, n, group_size, _parallel(name), name)) for name, (n, k) in SHAPES.items()}
    total = {key: sum(sizes[key] for sizes in layers.values()) for key in next(iter(layers.values()))}
    return {"group_size": group_size, "layers": layers, "block": total}


def all_bytes() -> list[dict[str, Any]]:
    """block_bytes of every group size of the format."""
    return [block_bytes(size) for size in GROUP_SIZES]


def _parallel(name: str) -> str:
    return "row" if name.endswith(("o_proj", "down_proj")) else "column"


def _bytes(spec: TensorSpec) -> int:
    return spec.dtype.itemsize * math.prod(spec.shape)
