"""The two ops on a GPU: allocate, choose tiles, launch. No host synchronisation, and nothing is measured here.

What is allocated depends on shapes, strides and addresses alone, so that a captured CUDA graph replays into the same
memory. The kernels are not specialised on M, so that a new number of tokens compiles nothing; `warm` compiles what a
layer can need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation, quantize_in_order, quantize_tokens
from morphoquant_vllm.gpu.kernels.gemm import int4_gemm
from morphoquant_vllm.gpu.kernels.reduce_splits import reduce_splits
from morphoquant_vllm.gpu.layout import TILE_N, GpuActivation, GpuWeight, group_size_of
from morphoquant_vllm.gpu.tiles import Tile, splits_of

# Codes per program: enough programs at M = 1 to spread a row over the device, enough work in each to hide its start.
QUANTIZE_BLOCK_K = 1024
QUANTIZE_WARPS = 4
# Tokens from which a program quantizes whole ones, and so many programs for each multiprocessor then, if there are.
WHOLE_TOKENS = 128
QUANTIZE_PROGRAMS = 4
# The widest row that such a program holds, in 16 bit: 64 KiB of shared memory. Wider ones are quantized in parts.
WIDEST_TOKEN = 32768
# With silu(gate) * up before it: registers would not hold more.
WIDEST_SILU_TOKEN = 16384
# Its warps, and the channels that each of its threads gathers at a time.
GATHER_WARPS = 16
GATHER_ELEMENTS = 16
# Tokens of which a program quantizes the same channels, where they come in order. They must begin on so many bytes and
# lie a multiple of so many elements apart: what Triton wants to know before it loads 16 bytes at a time.
IN_ORDER_TOKENS = 8
IN_ORDER_ALIGNMENT = 16
REDUCE_BLOCK_N = 256
# Tiles of tokens that pass over one tile of weights before the next: 8 * 128 tokens' codes stay in L2 beside it.
GROUP_M = 8


def quantize(
    x: Tensor,
    modality: Tensor,
    activation: GpuActivation,
    silu_mul: bool = False,
    pdl: bool = False,
    units: int = 1,
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] of x [M, K], and the row of each token, int32 [M]; modality int32 [M].

    `silu_mul`: of silu(gate) * up, where x [M, 2K] holds gate and up side by side. `pdl`: let the next kernel start
    while this one ends. `units`: multiprocessors of the device.
    """
    tokens, width = x.shape
    in_features = activation.in_features
    if width != in_features * (1 + silu_mul):
        raise ValueError(f"the quantizer needs x as [M, {in_features * (1 + silu_mul)}], got {list(x.shape)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty((tokens, in_features), dtype=torch.int8, device=x.device)
    rows = torch.empty((tokens,), dtype=torch.int32, device=x.device)
    if tokens:
        # Subtract and multiply must each round, as in the reference.
        settings = {"SILU_MUL": silu_mul, "PDL": pdl, "enable_fp_fusion": False}
        many, widest = tokens >= WHOLE_TOKENS, WIDEST_SILU_TOKEN if silu_mul else WIDEST_TOKEN
        if many and activation.in_order:
            _quantize_in_order(x, modality, activation, codes, rows, settings)
        elif many and triton.next_power_of_2(in_features) <= widest:
            _quantize_tokens(x, modality, activation, codes, rows, units, settings)
        else:
            _quantize_parts(x, modality, activation, codes, rows, settings)
    return codes, rows


def _quantize_parts(
    x: Tensor, modality: Tensor, activation: GpuActivation, codes: Tensor, rows: Tensor, settings: dict[str, Any]
) -> None:
    """One program for each QUANTIZE_BLOCK_K channels of each token."""
    parts = triton.cdiv(activation.in_features, QUANTIZE_BLOCK_K)
    quantize_activation[(x.shape[0] * parts,)](
        *(x, modality, *_tables(activation), _order(activation), *_massive(activation), codes, rows),
        *_sizes(x, activation),
        BLOCK_K=QUANTIZE_BLOCK_K,
        IN_ORDER=activation.in_order,
        num_warps=QUANTIZE_WARPS,
        **_intervals(activation),
        **settings,
    )


def _quantize_in_order(
    x: Tensor, modality: Tensor, activation: GpuActivation, codes: Tensor, rows: Tensor, settings: dict[str, Any]
) -> None:
    """One program for each QUANTIZE_BLOCK_K channels of IN_ORDER_TOKENS tokens."""
    if x.stride(0) % IN_ORDER_ALIGNMENT or x.data_ptr() % IN_ORDER_ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    tokens = x.shape[0]
    parts = triton.cdiv(activation.in_features, QUANTIZE_BLOCK_K)
    quantize_in_order[(triton.cdiv(tokens, IN_ORDER_TOKENS) * parts,)](
        *(x, modality, *_tables(activation), *_massive(activation), codes, rows),
        *(*_sizes(x, activation), tokens, IN_ORDER_TOKENS),
        BLOCK_K=QUANTIZE_BLOCK_K,
        num_warps=QUANTIZE_WARPS,
        **_intervals(activation),
        **settings,
    )


def _quantize_tokens(
    x: Tensor,
    modality: Tensor,
    activation: GpuActivation,
    codes: Tensor,
    rows: Tensor,
    units: int,
    settings: dict[str, Any],
) -> None:
    """Each program takes whole tokens, so many that there are QUANTIZE_PROGRAMS for each multiprocessor."""
    tokens = x.shape[0]
    width = triton.next_power_of_2(activation.in_features)
    each = triton.cdiv(tokens, QUANTIZE_PROGRAMS * units)
    quantize_tokens[(triton.cdiv(tokens, each),)](
        *(x, modality, *_tables(activation), _order(activation), *_massive(activation), codes, rows),
        *(*_sizes(x, activation), tokens, each),
        WIDTH=width,
        BLOCK_K=gather_block(width),
        num_warps=GATHER_WARPS,
        **_intervals(activation),
        **settings,
    )


def _tables(activation: GpuActivation) -> tuple[Tensor, Tensor, Tensor]:
    return activation.inverse, activation.centre, activation.limit


def _order(activation: GpuActivation) -> Tensor:
    # A pointer that is not read must still be one.
    return activation.massive_channel if activation.in_order else activation.channel_order


def _massive(activation: GpuActivation) -> tuple[Tensor, Tensor, Tensor]:
    return activation.massive_channel, activation.massive_low, activation.massive_high


def _sizes(x: Tensor, activation: GpuActivation) -> tuple[int, int, int]:
    """How far tokens lie apart, K and R."""
    return x.stride(0), activation.in_features, activation.gain.numel()


def _intervals(activation: GpuActivation) -> dict[str, int]:
    blocks, intervals = activation.massive_channel.shape
    return {"B": blocks, "J": intervals}


def gather_block(width: int) -> int:
    """Channels that a program gathers at a time, of whole tokens of up to `width` channels."""
    return min(width, 32 * GATHER_WARPS * GATHER_ELEMENTS)


def matmul(
    codes: Tensor,
    rows: Tensor,
    weight: GpuWeight,
    gain: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    splits: int,
    inline_assembly: bool,
    pdl: bool = False,
) -> Tensor:
    """y [M, N] in `dtype` from codes int8 [M, K] and rows int32 [M], with a given tile and split of K.

    `pdl`: start each kernel while the one before ends; see kernels/pdl.py.
    """
    tokens, out_features = codes.shape[0], weight.absorbed_bias.shape[1]
    y = torch.empty((tokens, out_features), dtype=dtype, device=codes.device)
    if not tokens:
        return y
    # A pointer that is not read must still be one.
    unread = weight.absorbed_bias
    channel_scale = weight.channel_scale if weight.two_level else unread
    terms = (channel_scale, rows, gain, weight.absorbed_bias, unread if bias is None else bias)
    settings = {"HAS_BIAS": bias is not None, "TWO_LEVEL": weight.two_level, "PDL": pdl, "enable_fp_fusion": True}
    if pdl:
        settings["launch_pdl"] = True
    if splits == 1:
        _multiply(codes, weight, terms, y, tile, splits, inline_assembly, settings)
    else:
        sums = torch.int32 if weight.two_level else torch.float32
        parts = torch.empty((splits, tokens, out_features), dtype=sums, device=codes.device)
        _multiply(codes, weight, terms, parts, tile, splits, inline_assembly, settings)
        _add_splits(parts, terms, y, settings)
    return y


def _multiply(
    codes: Tensor,
    weight: GpuWeight,
    terms: tuple[Tensor, ...],
    out: Tensor,
    tile: Tile,
    splits: int,
    inline_assembly: bool,
    settings: dict[str, Any],
) -> None:
    """The products, into y [M, N], or into the sums [splits, M, N] of each part of K if there are several."""
    tokens, in_features = codes.shape
    out_features = weight.absorbed_bias.shape[1]
    channels = 2 * weight.codes.shape[3]
    programs = triton.cdiv(tokens, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    int4_gemm[(programs, splits)](
        *(codes, weight.codes.view(torch.int8), weight.scale, *terms, out),
        *(tokens, out_features, in_features, splits),
        G=group_size_of(weight),
        P=channels,
        TILE_N=TILE_N,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        PARTIAL=splits > 1,
        GROUP_M=GROUP_M,
        EVEN_K=in_features % (channels * (1 + weight.two_level)) == 0,
        ASM=inline_assembly,
        STAGES=tile.stages,
        UNROLL=tile.unroll,
        JOINED=tile.joined,
        num_warps=tile.warps,
        **settings,
    )


def _add_splits(parts: Tensor, terms: tuple[Tensor, ...], y: Tensor, settings: dict[str, Any]) -> None:
    """y [M, N] from the sums [splits, M, N]."""
    splits, tokens, out_features = parts.shape
    reduce_splits[(tokens, triton.cdiv(out_features, REDUCE_BLOCK_N))](
        *(parts, *terms, y, tokens, out_features, splits),
        BLOCK_N=REDUCE_BLOCK_N,
        num_warps=4,
        **settings,
    )


def linear(
    x: Tensor,
    modality: Tensor,
    weight: GpuWeight,
    activation: GpuActivation,
    bias: Tensor | None,
    profile: Profile,
    silu_mul: bool = False,
) -> Tensor:
    """y [M, N] in the dtype of x [M, K], with the tile that the table names for this device and shape.

    `silu_mul`: the input of the layer is silu(gate) * up of x [M, 2K].
    """
    codes, rows = quantize(x, modality, activation, silu_mul, profile.pdl, profile.units)
    tile = profile.architecture.tile(x.shape[0], group_size_of(weight), weight.two_level)
    splits = splits_of(tile, max(1, x.shape[0]), weight.absorbed_bias.shape[1], weight.codes.shape[1], profile.units)
    return matmul(
        codes, rows, weight, activation.gain, bias, x.dtype, tile, splits, profile.inline_assembly, profile.pdl
    )


def warm(
    weight: GpuWeight, activation: GpuActivation, bias: Tensor | None, dtype: torch.dtype, profile: Profile
) -> None:
    """Compile, by running them on one token, all kernels that this layer can need with activations of `dtype`."""
    device = weight.codes.device
    for tokens in (1, WHOLE_TOKENS):
        gate_up = torch.zeros((tokens, 2 * activation.in_features), dtype=dtype, device=device)
        modality = torch.zeros(tokens, dtype=torch.int32, device=device)
        quantize(gate_up, modality, activation, True, profile.pdl, profile.units)
        codes, rows = quantize(gate_up[:, ::2].contiguous(), modality, activation, False, profile.pdl, profile.units)
    codes, rows = codes[:1], rows[:1]
    for tile in profile.architecture.tiles:
        if tile.serves(group_size_of(weight), weight.two_level):
            for splits in {1, min(tile.max_splits, 2)}:
                # A layer with a bias may be called without it.
                for term in {None, bias}:
                    matmul(
                        codes,
                        rows,
                        weight,
                        activation.gain,
                        term,
                        dtype,
                        tile,
                        splits,
                        profile.inline_assembly,
                        profile.pdl,
                    )
