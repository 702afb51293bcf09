"""Compiles the kernels for a GPU that is not at hand, as a launch there would: for tests and the cost model."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from morphoquant_vllm.gpu import int8_path, norm_launch, product_launch, quantize_launch
from morphoquant_vllm.gpu.device import OLDEST_PDL
from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation, quantize_in_order, quantize_tokens
from morphoquant_vllm.gpu.kernels.fused_int8 import fused_int8
from morphoquant_vllm.gpu.kernels.gemm import int4_gemm
from morphoquant_vllm.gpu.kernels.gemm_adding import int4_gemm_adding
from morphoquant_vllm.gpu.kernels.int8_gemm import int8_gemm
from morphoquant_vllm.gpu.kernels.norm_quant import quantize_normed
from morphoquant_vllm.gpu.kernels.reduce_splits import reduce_splits
from morphoquant_vllm.gpu.kernels.unpack_int8 import unpack_int8
from morphoquant_vllm.gpu.layout import TILE_N, tile_channels
from morphoquant_vllm.gpu.tiles import Int8Tile, Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Names of 16-bit activations in Triton's signatures.
TYPES = {"bfloat16": "*bf16", "float16": "*fp16"}
# Kernels that do not wait for the kernel before them.
QUANTIZERS = (quantize_activation, quantize_in_order, quantize_tokens, quantize_normed)
# Types of the partial sums of a split K, with group scales and with two-level ones.
SUMS = {False: "*fp32", True: "*i32"}


def pdl(target: str) -> bool:
    """Whether kernels on this target are launched while the one before ends."""
    found = TARGETS[target]
    return found.backend == "cuda" and int(found.arch) >= 10 * OLDEST_PDL


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...], target: str, **options: Any
) -> CompiledKernel:
    """Compile `kernel` for a key of TARGETS.

    `types`: the types of run-time arguments. `aligned`: the pointers and sizes that are multiples of 16 at a launch.
    Without them Triton builds another, slower kernel.
    """
    names = kernel.arg_names
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    dependent = {"launch_pdl": True} if pdl(target) and kernel not in QUANTIZERS else {}
    return triton.compile(source, target=TARGETS[target], options=options | dependent)


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


def build_unpack(target: str) -> CompiledKernel:
    """The kernel that unpacks a layer into int8, as `int8_path.unpack_launch` launches it."""
    pointers = {"weight_ptr": "*i8", "level_ptr": "*i32", "out_ptr": "*i8"}
    nvidia = TARGETS[target].backend == "cuda"
    constants = {
        "P": tile_channels(0, two_level=True),
        "TILE_N": TILE_N,
        "ASM": nvidia,
        "PDL": pdl(target),
    }
    return build(
        unpack_int8,
        pointers | {"padded_n": "i32", "turns": "i32"},
        constants,
        (*pointers, "padded_n"),
        target,
        num_warps=int8_path.UNPACK_WARPS["nvidia" if nvidia else "amd"],
        # The kernel has no float operation.
        enable_fp_fusion=False,
    )


def build_int8_gemm(
    target: str, tile: Int8Tile, *, dtype: str = "bfloat16", has_bias: bool = False, even_k: bool = True
) -> CompiledKernel:
    """The product of the int8 path with the constants that `int8_path.gemm_launch` would give it."""
    pointers = {
        "channel_scale_ptr": "*fp32",
        "rows_ptr": "*i32",
        "gain_ptr": "*fp32",
        "absorbed_bias_ptr": "*fp32",
        "bias_ptr": TYPES[dtype] if has_bias else "*fp32",
        "out_ptr": TYPES[dtype],
    }
    operands = {"codes": "*i8", "weights": "*i8"}
    if tile.fused:
        operands = {"codes_ptr": "*i8", "weight_ptr": "*i8", "level_ptr": "*i32"}
    elif tile.descriptors:
        operands = {
            "codes": f"tensordesc<i8[{tile.block_m}, {tile.block_k}]>",
            "weights": f"tensordesc<i8[{tile.block_n}, {tile.block_k}]>",
        }
    constants = {
        "BLOCK_M": tile.block_m,
        "GROUP_M": int8_path.GROUP_M,
        "STAGES": tile.stages,
        "EVEN_K": even_k,
        "HAS_BIAS": has_bias,
        "PDL": pdl(target),
    }
    sizes = ["N", "K"]
    if not tile.fused:
        constants |= {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "DESCRIPTORS": tile.descriptors}
        sizes.append("padded_k")
    return build(
        fused_int8 if tile.fused else int8_gemm,
        operands | pointers | dict.fromkeys(("M", *sizes), "i32"),
        constants,
        (*(() if tile.descriptors else operands), *pointers, *sizes),
        target,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
