"""The kernels of the int8 path and the 8-bit head, compiled for a GPU that is not at hand. See aot_compile."""

from __future__ import annotations

from triton.compiler import CompiledKernel

from morphoquant_vllm.gpu import head, int8_path
from morphoquant_vllm.gpu.kernels.eight_bit_head import eight_bit_head
from morphoquant_vllm.gpu.kernels.fused_int8 import fused_int8
from morphoquant_vllm.gpu.kernels.int8_gemm import int8_gemm
from morphoquant_vllm.gpu.kernels.unpack_int8 import unpack_int8
from morphoquant_vllm.gpu.layout import TILE_N, tile_channels
from morphoquant_vllm.gpu.tiles import Int8Tile
from morphoquant_vllm.gpu.tools.targets import TARGETS, TYPES, build, pdl


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


def build_head(target: str, tile: head.HeadTile, *, dtype: str = "bfloat16", even_k: bool = True) -> CompiledKernel:
    """The 8-bit head with the constants that `head.launch_of` would give it."""
    pointers = {"x_ptr": TYPES[dtype], "out_ptr": TYPES[dtype], "codes_ptr": "*i8", "scale_ptr": "*fp32"}
    return build(
        eight_bit_head,
        pointers | dict.fromkeys(("M", "N", "K"), "i32"),
        head.constants(tile, tile.block_k) | {"EVEN_K": even_k, "FLOAT32": False},
        (*pointers, "N", "K"),
        target,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
