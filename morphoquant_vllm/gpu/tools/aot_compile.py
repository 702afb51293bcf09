"""Quantizers and products with packed weights, compiled for a GPU that is not at hand.

For tests and for the cost model. Constants and options are those of a launch.
"""

from __future__ import annotations

from triton.compiler import CompiledKernel

from morphoquant_vllm.gpu import norm_launch, product_launch, quantize_launch
from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation, quantize_in_order, quantize_tokens
from morphoquant_vllm.gpu.kernels.gemm import int4_gemm
from morphoquant_vllm.gpu.kernels.gemm_adding import int4_gemm_adding
from morphoquant_vllm.gpu.kernels.norm_quant import quantize_normed
from morphoquant_vllm.gpu.kernels.reduce_splits import reduce_splits
from morphoquant_vllm.gpu.layout import TILE_N, tile_channels
from morphoquant_vllm.gpu.tiles import Tile
from morphoquant_vllm.gpu.tools.targets import SUMS, TARGETS, TYPES, build, pdl


def build_gemm(
    target: str,
    tile: Tile,
    group_size: int,
    *,
    partial: bool = False,
    dtype: str = "bfloat16",
    has_bias: bool = False,
    even_k: bool = True,
    aligned: bool = True,
) -> CompiledKernel:
    """The matrix kernel with the constants that `product_launch` would give it. `aligned` False: none is aligned."""
    pointers = {
        "codes_ptr": "*i8",
        "weight_ptr": "*i8",
        "scale_ptr": "*i32" if tile.two_level or group_size < tile_channels(group_size) else "*fp32",
        "channel_scale_ptr": "*fp32",
        "rows_ptr": "*i32",
        "gain_ptr": "*fp32",
        "absorbed_bias_ptr": "*fp32",
        "bias_ptr": TYPES[dtype] if has_bias else "*fp32",
        "out_ptr": SUMS[tile.two_level] if partial else TYPES[dtype],
    }
    constants = {
        "G": group_size,
        "P": tile_channels(group_size, tile.two_level),
        "TILE_N": TILE_N,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "PARTIAL": partial,
        "GROUP_M": product_launch.GROUP_M,
        "EVEN_K": even_k,
        "HAS_BIAS": has_bias,
        "ASM": TARGETS[target].backend == "cuda",
        "STAGES": tile.stages,
        "UNROLL": tile.unroll,
        "JOINED": tile.joined,
        "TWO_LEVEL": tile.two_level,
        "PDL": pdl(target),
    }
    return build(
        int4_gemm,
        pointers | dict.fromkeys(("M", "N", "K", "splits"), "i32"),
        constants,
        (*pointers, "N", "K") if aligned else (),
        target,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )


def build_quantize(
    target: str,
    *,
    dtype: str = "bfloat16",
    blocks: int = 1,
    fusion: bool = False,
    silu_mul: bool = False,
    width: int = 0,
    in_order: bool = False,
    many: bool = False,
) -> CompiledKernel:
    """The activation quantizer for B = `blocks` sets of massive intervals.

    `fusion` True: with fused operations, unlike a launch. `width`: the kernel of whole tokens of up to `width`
    channels; without it, a kernel of some channels of a token. `in_order`: channels come in channel order. `many`: the
    kernel for many tokens in channel order.
    """
    aligned = {
        "inverse_ptr": "*fp32",
        "centre_ptr": "*fp32",
        "limit_ptr": "*i8",
        "order_ptr": "*i32",
        "massive_channel_ptr": "*i32",
        "massive_low_ptr": "*fp32",
        "massive_high_ptr": "*fp32",
        "codes_ptr": "*i8",
        "rows_ptr": "*i32",
    }
    kernel = quantize_in_order if many else quantize_tokens if width else quantize_activation
    if many:
        aligned = {"x_ptr": TYPES[dtype]} | aligned
        del aligned["order_ptr"]
    types = {"x_ptr": TYPES[dtype], "modality_ptr": "*i32"} | aligned
    constants = {"B": blocks, "J": 4, "SILU_MUL": silu_mul, "PDL": pdl(target)}
    if kernel is quantize_activation:
        constants["IN_ORDER"] = in_order
    whole = (
        {"WIDTH": width, "BLOCK_K": quantize_launch.gather_block(width)}
        if width
        else {"BLOCK_K": quantize_launch.QUANTIZE_BLOCK_K}
    )
    sizes = ("x_stride", "K", "R", *(("M", "tokens") if width or many else ()))
    return build(
        kernel,
        types | dict.fromkeys(sizes, "i32"),
        constants | whole,
        (*aligned, "K", *(("x_stride",) if many else ())),
        target,
        num_warps=quantize_launch.GATHER_WARPS if width else quantize_launch.QUANTIZE_WARPS,
        enable_fp_fusion=fusion,
    )


def build_reduce(
    target: str, *, dtype: str = "bfloat16", has_bias: bool = False, two_level: bool = False
) -> CompiledKernel:
    """The kernel that adds the partial sums of a split K."""
    pointers = {
        "part_ptr": SUMS[two_level],
        "channel_scale_ptr": "*fp32",
        "rows_ptr": "*i32",
        "gain_ptr": "*fp32",
        "absorbed_bias_ptr": "*fp32",
        "bias_ptr": TYPES[dtype] if has_bias else "*fp32",
        "out_ptr": TYPES[dtype],
    }
    return build(
        reduce_splits,
        pointers | dict.fromkeys(("M", "N", "splits"), "i32"),
        {"BLOCK_N": product_launch.REDUCE_BLOCK_N, "HAS_BIAS": has_bias, "TWO_LEVEL": two_level, "PDL": pdl(target)},
        (*pointers, "N"),
        target,
        num_warps=4,
        enable_fp_fusion=True,
    )


def build_norm_quantize(
    target: str,
    width: int,
    *,
    dtype: str = "bfloat16",
    blocks: int = 1,
    add: bool = True,
    in_order: bool = False,
    many: bool = False,
    fusion: bool = False,
) -> CompiledKernel:
    """The kernel that norms and quantizes tokens of up to `width` channels; `many`: the one for many tokens.

    `fusion` True: with fused operations, unlike a launch.
    """
    tables = {
        "inverse_ptr": "*fp32",
        "centre_ptr": "*fp32",
        "limit_ptr": "*i8",
        "order_ptr": "*i32",
        "massive_channel_ptr": "*i32",
        "massive_low_ptr": "*fp32",
        "massive_high_ptr": "*fp32",
        "codes_ptr": "*i8",
        "rows_ptr": "*i32",
    }
    x = TYPES[dtype]
    aligned = {"x_ptr": x, "residual_ptr": x, "norm_weight_ptr": x} | tables
    aligned |= {"new_residual_ptr": x, "normed_ptr": x}
    sizes = ("x_stride", "residual_stride", "K", "R", "M", "tokens")
    return build(
        quantize_normed,
        {"modality_ptr": "*i32", "epsilon": "fp32"} | aligned | dict.fromkeys(sizes, "i32"),
        {
            "B": blocks,
            "J": 4,
            "WIDTH": width,
            "BLOCK_K": quantize_launch.gather_block(width),
            "ADD": add,
            "WRITE_NORMED": False,
            "IN_ORDER": in_order,
            "EARLY": not many and width <= norm_launch.WIDEST_EARLY,
            "PDL": pdl(target),
        },
        (*aligned, "K", "x_stride", "residual_stride"),
        target,
        num_warps=norm_launch.norm_warps(width),
        enable_fp_fusion=fusion,
    )


def build_gemm_adding(
    target: str, tile: Tile, group_size: int, *, dtype: str = "bfloat16", has_bias: bool = False
) -> CompiledKernel:
    """The matrix kernel over a split K that adds its partial sums itself."""
    pointers = {
        "codes_ptr": "*i8",
        "rows_ptr": "*i32",
        "part_ptr": SUMS[tile.two_level],
        "out_ptr": TYPES[dtype],
        "counter_ptr": "*i32",
        "weight_ptr": "*i8",
        "scale_ptr": "*i32" if tile.two_level or group_size < tile_channels(group_size) else "*fp32",
        "channel_scale_ptr": "*fp32",
        "gain_ptr": "*fp32",
        "absorbed_bias_ptr": "*fp32",
        "bias_ptr": TYPES[dtype] if has_bias else "*fp32",
    }
    constants = {
        "G": group_size,
        "P": tile_channels(group_size, tile.two_level),
        "TILE_N": TILE_N,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "GROUP_M": product_launch.GROUP_M,
        "EVEN_K": True,
        "HAS_BIAS": has_bias,
        "ASM": TARGETS[target].backend == "cuda",
        "STAGES": tile.stages,
        "UNROLL": tile.unroll,
        "JOINED": tile.joined,
        "TWO_LEVEL": tile.two_level,
        "PDL": pdl(target),
    }
    return build(
        int4_gemm_adding,
        pointers | dict.fromkeys(("M", "N", "K", "splits"), "i32"),
        constants,
        (*pointers, "N", "K"),
        target,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
