"""Many tokens of a layer with two-level scales: unpack it once into int8, then multiply int8 x int8.

The workspace holds one layer at a time, so all layers can share one that the largest fits into: `workspace_bytes`. The
kernels of one stream run in order, so a layer is unpacked when the product before has read the workspace; two streams
need a workspace each.

    launch = unpack_launch(...)    all its arguments stay the same from call to call
    launch = gemm_launch(...)      codes, rows, out and M change, and with M the grid; `weights` stays

`unpack` and `int8_matmul` make and run them. What is launched depends on shapes and addresses alone, so that a CUDA
graph can be captured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from morphoquant_vllm.gpu.kernels.int8_gemm import int8_gemm
from morphoquant_vllm.gpu.kernels.unpack_int8 import unpack_int8
from morphoquant_vllm.gpu.layout import TILE_N, GpuWeight
from morphoquant_vllm.gpu.tiles import Int8Tile

# A thread unpacks 16 bytes of each of the two tiles of a program: 128 rows of 32 bytes.
UNPACK_WARPS = 8
# Tiles of tokens that pass over one tile of weights before the next.
GROUP_M = 8


class Launch(NamedTuple):
    """One launch of a kernel: what a bound handle needs."""

    kernel: Any
    grid: tuple[int]
    # Those of the kernel that are no constants, in its order.
    arguments: tuple[Any, ...]
    # Constants by name, and options of the launch.
    settings: dict[str, Any]

    def run(self) -> None:
        """Launch it through Triton's own path."""
        self.kernel[self.grid](*self.arguments, **self.settings)


def workspace_shape(weight: GpuWeight) -> tuple[int, int]:
    """N rounded up to 128, and K rounded up to 128: the int8 matrix that a layer is unpacked into."""
    blocks, steps, rows, half = weight.codes.shape
    return blocks * rows, steps * 2 * half


def workspace_bytes(weight: GpuWeight) -> int:
    """Bytes that the layer needs of the workspace."""
    rows, channels = workspace_shape(weight)
    return rows * channels


def unpacked(weight: GpuWeight, workspace: Tensor) -> Tensor:
    """The part of the workspace, int8 [bytes], that the layer is unpacked into, as int8 [N', K'].

    Raises ValueError if it is too small or no int8 vector.
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
    settings = {"P": 2 * weight.codes.shape[3], "TILE_N": TILE_N, "ASM": inline_assembly, "num_warps": UNPACK_WARPS}
    return Launch(
        kernel=unpack_int8,
        grid=(weight.codes.shape[0] * turns,),
        arguments=(weight.codes.view(torch.int8), weight.scale, matrix, matrix.shape[0], turns),
        settings=settings | _options(pdl),
    )


def operand(matrix: Tensor, block: tuple[int, int], descriptors: bool) -> Tensor | TensorDescriptor:
    """What the kernel is given of an int8 matrix: itself, or its descriptor in blocks."""
    if not descriptors:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def weight_operand(weight: GpuWeight, workspace: Tensor, tile: Int8Tile) -> Tensor | TensorDescriptor:
    """The operand that stays the same from call to call: the unpacked weights."""
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

    codes int8 [M, K] and rows int32 [M] as the quantizer leaves them; `weights` as `weight_operand` makes them.
    """
    tokens, in_features = codes.shape
    out_features = out.shape[1]
    # A pointer that is not read must still be one.
    terms = (weight.channel_scale, rows, gain, weight.absorbed_bias, weight.absorbed_bias if bias is None else bias)
    constants = {
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "STAGES": tile.stages,
        "EVEN_K": in_features % tile.block_k == 0,
        "HAS_BIAS": bias is not None,
        "DESCRIPTORS": tile.descriptors,
    }
    left = operand(codes, (tile.block_m, tile.block_k), tile.descriptors)
    return Launch(
        kernel=int8_gemm,
        grid=(triton.cdiv(tokens, tile.block_m) * triton.cdiv(out_features, tile.block_n),),
        arguments=(left, weights, *terms, out, tokens, out_features, in_features, workspace_shape(weight)[1]),
        settings=constants | {"num_warps": tile.warps, "enable_fp_fusion": True} | _options(pdl),
    )


def _options(pdl: bool) -> dict[str, Any]:
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def unpack(weight: GpuWeight, workspace: Tensor, *, inline_assembly: bool, pdl: bool = False) -> None:
    """Fill the workspace, int8 [bytes], with q * level of the layer, [N', K'] in a row; see `unpacked`."""
    unpack_launch(weight=weight, workspace=workspace, inline_assembly=inline_assembly, pdl=pdl).run()


def int8_matmul(
    *,
    codes: Tensor,
    rows: Tensor,
    weight: GpuWeight,
    workspace: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Int8Tile,
    pdl: bool = False,
) -> Tensor:
    """y [M, N] in `dtype` from codes int8 [M, K] and rows int32 [M], after `unpack` of the layer."""
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
