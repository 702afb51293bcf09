"""The kernels of routed experts, compiled for a GPU that is not at hand, with the constants of a launch."""

from __future__ import annotations

from triton.compiler import CompiledKernel

from morphoquant_vllm.gpu import experts, quantize_launch
from morphoquant_vllm.gpu.kernels.experts import add_pairs, experts_gemm, quantize_pairs
from morphoquant_vllm.gpu.layout import tile_channels
from morphoquant_vllm.gpu.tiles import Tile
from morphoquant_vllm.gpu.tools.targets import TARGETS, TYPES, build


def build_experts(
    target: str, tile: Tile, group_size: int, *, down: bool = False, dtype: str = "bfloat16", even_k: bool = True
) -> CompiledKernel:
    """The product of pairs with gate and up in `dtype`, or with down in float32."""
    aligned = {
        "codes_ptr": "*i8",
        "rows_ptr": "*i32",
        "out_ptr": "*fp32" if down else TYPES[dtype],
        "expert_ptr": "*i32",
        "pair_ptr": "*i32",
        "weight_ptr": "*i8",
        "scale_ptr": "*i32" if tile.two_level or group_size < tile_channels(group_size) else "*fp32",
        "channel_scale_ptr": "*fp32",
        "gain_ptr": "*fp32",
        "absorbed_bias_ptr": "*fp32",
    }
    constants = experts.constants(tile, 1, group_size, tile.two_level, TARGETS[target].backend == "cuda")
    return build(
        experts_gemm,
        aligned | dict.fromkeys(("pairs", "slots", "N", "K", "R", "E"), "i32"),
        constants | {"EVEN_K": even_k},
        (*aligned, "N", "K"),
        target,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )


def build_quantize_pairs(
    target: str, *, dtype: str = "bfloat16", blocks: int = 1, in_order: bool = True
) -> CompiledKernel:
    """The quantizer of pairs, for `blocks` sets of massive intervals."""
    aligned = {
        "codes_ptr": "*i8",
        "rows_ptr": "*i32",
        "inverse_ptr": "*fp32",
        "centre_ptr": "*fp32",
        "limit_ptr": "*i8",
        "order_ptr": "*i32",
        "massive_channel_ptr": "*i32",
        "massive_low_ptr": "*fp32",
        "massive_high_ptr": "*fp32",
    }
    others = {"x_ptr": TYPES[dtype], "modality_ptr": "*i32", "ids_ptr": "*i32"}
    return build(
        quantize_pairs,
        others | aligned | dict.fromkeys(("x_stride", "K", "R", "E"), "i32"),
        {"B": blocks, "J": 4, "BLOCK_K": quantize_launch.QUANTIZE_BLOCK_K, "IN_ORDER": in_order},
        (*aligned, "K"),
        target,
        num_warps=quantize_launch.QUANTIZE_WARPS,
        enable_fp_fusion=False,
    )


def build_add_pairs(target: str, *, dtype: str = "bfloat16") -> CompiledKernel:
    """The weighted sum of a token's pairs."""
    aligned = {"products_ptr": "*fp32", "y_ptr": TYPES[dtype]}
    return build(
        add_pairs,
        {"weights_ptr": "*fp32", "ids_ptr": "*i32"} | aligned | dict.fromkeys(("slots", "N", "E"), "i32"),
        {"BLOCK_N": experts.ADD_BLOCK_N},
        (*aligned, "N"),
        target,
        num_warps=experts.ADD_WARPS,
        enable_fp_fusion=True,
    )
