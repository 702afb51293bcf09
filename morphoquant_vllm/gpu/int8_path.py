"""The int8 path, for many tokens: a layer with two-level scales is unpacked into int8 once, then int8 x int8.

A fused tile unpacks inside the kernel of the product and needs no workspace: kernels/fused_int8.py.

The workspace holds one layer at a time, so all layers share one that the largest fits into: `workspace_bytes`. The
kernels of one stream run in order: the product before has read the workspace when the next layer is unpacked. A second
stream is served without the workspace while the first is busy: turn.py.

    unpack_launch(...)    grid and arguments stay the same from call to call
    gemm_launch(...)      the first four arguments vary: codes, rows, out and M; the grid varies with M

`unpack` and `int8_matmul` make and run them. A bound layer keeps them compiled. With descriptors it passes `codes` as
an AddressDescriptor, made anew at each call, and keeps the descriptor of the workspace. A launch depends on shapes and
addresses alone, so a CUDA graph can capture it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from morphoquant_vllm.gpu.kernels.int8_gemm import int8_gemm
from morphoquant_vllm.gpu.kernels.unpack_int8 import unpack_int8
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.layout import TILE_N, GpuWeight
from morphoquant_vllm.gpu.tiles import Int8Tile

# A program has two tiles of 4 KiB, and a thread unpacks 16 bytes of each. That takes 256 threads; AMD's warps have 64.
# With half as many threads, NVIDIA GPUs would pass levels through shared memory.
UNPACK_WARPS = {"nvidia": 8, "amd": 4}
# Tiles of tokens that use one tile of weights before the next tile is read.
GROUP_M = 8


class AddressDescriptor:
    """The fields of a TensorDescriptor that Triton's launcher reads, over a bare address: for compiled launches.

    The blocks are those that the kernel was compiled for. It costs less than a TensorDescriptor and needs no tensor.
    """

    __slots__ = ("address", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, address: int, rows: int, columns: int) -> None:
        """Describe an int8 matrix [rows, columns], row-major, at an address that is a multiple of 16."""
        self.address, self.shape, self.strides = address, (rows, columns), (columns, 1)

    @property
    def base(self) -> AddressDescriptor:
        """Return the object itself: it has the one tensor method that the launcher calls."""
        return self

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def workspace_shape(weight: GpuWeight) -> tuple[int, int]:
    """N rounded up to 128, and K rounded up to 128: the int8 matrix that a layer is unpacked into."""
    blocks, k_tiles, rows, half = weight.codes.shape
    return blocks * rows, k_tiles * 2 * half


def workspace_bytes(weight: GpuWeight) -> int:
    """Bytes of workspace that the layer needs."""
    rows, channels = workspace_shape(weight)
    return rows * channels


def unpacked(weight: GpuWeight, workspace: Tensor) -> Tensor:
    """The start of the workspace, int8 [bytes], as the int8 [N', K'] that the layer is unpacked into.

    Raises ValueError if it is too small or not an int8 vector.
    """
    needed = workspace_bytes(weight)
    if workspace.dtype is not torch.int8 or workspace.dim() != 1 or workspace.numel() < needed:
        raise ValueError(f"the layer needs a workspace int8 [{needed}], got {workspace.dtype} {list(workspace.shape)}")
    return workspace[:needed].view(workspace_shape(weight))


def unpack_launch(*, weight: GpuWeight, workspace: Tensor, inline_assembly: bool, pdl: bool = False) -> Launch:
    """The launch that unpacks `weight` into the workspace, int8 [bytes]."""
    if not weight.two_level:
        raise ValueError("only weights with two-level scales fit int8")
    matrix = unpacked(weight, workspace)
    turns = weight.scale.shape[0]
    arguments = {
        "weight_ptr": weight.codes.view(torch.int8),
        "level_ptr": weight.scale,
        "out_ptr": matrix,
        "padded_n": matrix.shape[0],
        "turns": turns,
        "P": 2 * weight.codes.shape[3],
        "TILE_N": TILE_N,
        "ASM": inline_assembly,
        "PDL": pdl,
    }
    warps = UNPACK_WARPS["nvidia" if inline_assembly else "amd"]
    # The kernel has no float operation.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return Launch(unpack_int8, (weight.codes.shape[0] * turns, 1), arguments, options | _dependent(pdl))


def operand(matrix: Tensor, block: tuple[int, int], descriptors: bool) -> Tensor | TensorDescriptor:
    """The kernel's argument for an int8 matrix: the matrix itself, or its descriptor in blocks."""
    if not descriptors:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def weight_operand(weight: GpuWeight, workspace: Tensor | None, tile: Int8Tile) -> Tensor | TensorDescriptor:
    """The operand that stays the same from call to call: unpacked weights, or packed ones for a fused tile."""
    if tile.fused:
        return weight.codes.view(torch.int8)
    if workspace is None:
        raise ValueError("a tile that is not fused needs a workspace")
    return operand(unpacked(weight, workspace), (tile.block_n, tile.block_k), tile.descriptors)


def gemm_launch(
    *,
    codes: Tensor,
    rows: Tensor,
    weight: GpuWeight,
    weights: Tensor | TensorDescriptor,
    gain: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Int8Tile,
    pdl: bool = False,
) -> Launch:
    """The launch that multiplies into `out` [M, N], M >= 1.

    codes int8 [M, K] and rows int32 [M] come from the quantizer, `weights` from `weight_operand`.
    """
    tokens, in_features = codes.shape
    out_features = out.shape[1]
    terms = {
        "channel_scale_ptr": weight.channel_scale,
        "gain_ptr": gain,
        "absorbed_bias_ptr": weight.absorbed_bias,
        # The kernel does not read it, but it must be a pointer.
        "bias_ptr": weight.absorbed_bias if bias is None else bias,
        "N": out_features,
        "K": in_features,
    }
    constants = {
        "BLOCK_M": tile.block_m,
        "GROUP_M": GROUP_M,
        "STAGES": tile.stages,
        "EVEN_K": in_features % tile.block_k == 0,
        "HAS_BIAS": bias is not None,
        "PDL": pdl,
    }
    grid = (programs(tile, tokens, out_features), 1)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True} | _dependent(pdl)
    varying = {"rows_ptr": rows, "out_ptr": out, "M": tokens}
    if tile.fused:
        # The import is here because a Triton without Gluon serves all other tiles.
        from morphoquant_vllm.gpu.kernels.fused_int8 import fused_int8

        packed = {"weight_ptr": weights, "level_ptr": weight.scale}
        return Launch(fused_int8, grid, {"codes_ptr": codes} | varying | packed | terms | constants, options)
    arguments = {
        "codes": operand(codes, (tile.block_m, tile.block_k), tile.descriptors),
        **varying,
        "weights": weights,
        **terms,
        "padded_k": workspace_shape(weight)[1],
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "DESCRIPTORS": tile.descriptors,
        **constants,
    }
    return Launch(int8_gemm, grid, arguments, options)


def programs(tile: Int8Tile, tokens: int, out_features: int) -> int:
    """Programs of the product: tiles of the output [tokens, out_features]."""
    return -(-tokens // tile.block_m) * -(-out_features // tile.block_n)


def _dependent(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}


def unpack(weight: GpuWeight, workspace: Tensor, *, inline_assembly: bool, pdl: bool = False) -> None:
    """Fill the workspace, int8 [bytes], with the layer's q * level as contiguous [N', K']; see `unpacked`."""
    unpack_launch(weight=weight, workspace=workspace, inline_assembly=inline_assembly, pdl=pdl).run()


def int8_matmul(
    *,
    codes: Tensor,
    rows: Tensor,
    weight: GpuWeight,
    workspace: Tensor | None,
    gain: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Int8Tile,
    pdl: bool = False,
) -> Tensor:
    """y [M, N] in `dtype` from codes int8 [M, K] and rows int32 [M].

    `unpack` of the layer must come before. A fused tile needs neither that nor a workspace.
    """
    y = torch.empty((codes.shape[0], weight.absorbed_bias.shape[1]), dtype=dtype, device=codes.device)
    if codes.shape[0]:
        gemm_launch(
            codes=codes,
            rows=rows,
            weight=weight,
            weights=weight_operand(weight, workspace, tile),
            gain=gain,
            bias=bias,
            out=y,
            tile=tile,
            pdl=pdl,
        ).run()
    return y
