"""Routed experts on a GPU: the sorting of pairs, and the launches.

M tokens, T experts of each token, E experts. A pair is a token and an expert that it chose; pair p is slot p % T of
token p // T. Everything follows from M, T and E: no step waits for the host, and memory is the same for any routing.
So a captured CUDA graph replays with other routings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from morphoquant_vllm.gpu import device, experts_layout, layout
from morphoquant_vllm.gpu.experts_layout import GpuExperts
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight
from morphoquant_vllm.gpu.tiles import Architecture, Tile

if TYPE_CHECKING:
    from morphoquant_vllm.gpu.device import Profile

prepare = experts_layout.prepare
# An expert's pairs take the tile of as many tokens, at most this many: larger blocks would stay half empty.
MOST_TOKENS = 64
# Outputs and warps of a program that adds up pairs.
ADD_BLOCK_N, ADD_WARPS = 1024, 4


class Blocks(NamedTuple):
    """Pairs sorted into blocks of one expert each."""

    expert: Tensor  # int32 [blocks]: the expert of a block; E if it is empty
    pair: Tensor  # int32 [blocks * block size]: the pair in a place; `pairs` if there is none


def tile_of(architecture: Architecture, pairs: int, count: int, group_size: int, two_level: bool) -> Tile:
    """The tile for `pairs` pairs of `count` experts, as if each expert had as many."""
    return architecture.tile(min(max(-(-pairs // count), 1), MOST_TOKENS), group_size, two_level)


def tiles_of(architecture: Architecture, group_size: int, two_level: bool) -> list[Tile]:
    """Every tile that `tile_of` can choose."""
    found = []
    for tile in architecture.tiles_of(group_size, two_level):
        found.append(tile)
        if tile.max_tokens is None or tile.max_tokens >= MOST_TOKENS:
            break
    return found


def most_blocks(pairs: int, count: int, block: int) -> int:
    """Blocks that suffice for any routing: each expert that has pairs has at most one block that is not full."""
    return (pairs + min(pairs, count) * (block - 1)) // block


def sorted_blocks(ids: Tensor, count: int, block: int) -> Blocks:
    """Sort pairs by expert on the device; ids int32 [pairs], those outside [0, count) are in no block.

    Pairs of one expert keep their order.
    """
    pairs, blocks = ids.numel(), most_blocks(ids.numel(), count, block)
    local = torch.where((ids >= 0) & (ids < count), ids, count)
    found, order = torch.sort(local, stable=True)
    bounds = torch.arange(count + 1, dtype=ids.dtype, device=ids.device)
    start = torch.searchsorted(found, bounds)
    padded = (start.diff() + block - 1) // block * block
    end = padded.cumsum(0)
    # One place past the last for pairs of no expert.
    first = torch.cat((end - padded, end.new_full((1,), blocks * block)))
    place = first[found] + torch.arange(pairs, device=ids.device) - start[found]
    place = place.clamp(max=blocks * block)
    pair = ids.new_full((blocks * block + 1,), pairs).scatter_(0, place, order.to(ids.dtype))
    begins = torch.arange(blocks, device=ids.device) * block
    expert = torch.searchsorted(end, begins, right=True)
    return Blocks(expert.to(torch.int32), pair[:-1].to(torch.int32))


def run(x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, prepared: GpuExperts) -> Tensor:
    """y [M, K] in the dtype of x [M, K], as numerics.experts.experts; modality has M entries or more."""
    return run_on(x, modality, topk_weights, topk_ids, prepared, device.profile_of(x.device))


def run_on(
    x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, prepared: GpuExperts, profile: Profile
) -> Tensor:
    """`run` for a device of `profile`."""
    tokens, slots = topk_ids.shape
    y = x.new_empty((tokens, prepared.down.absorbed_bias.shape[2]))
    if not topk_ids.numel():
        return y.zero_()
    ids = topk_ids.reshape(-1).to(torch.int32)
    settings = prepared.size, prepared.group_size, prepared.down.two_level
    tile = tile_of(profile.architecture, ids.numel(), *settings)
    blocks = sorted_blocks(ids, prepared.size, tile.block_m)
    modality = modality[:tokens]
    products = gate_up(x, modality, slots, blocks, prepared, tile, profile)
    codes, rows = quantize(products, modality.repeat_interleave(slots), ids, prepared.intermediate)
    added = multiply(codes, rows, 1, blocks, prepared.down, prepared.intermediate.gain, torch.float32, tile, profile)
    add(added, topk_weights.contiguous(), ids, prepared.size, y)
    return y


def gate_up(
    x: Tensor, modality: Tensor, slots: int, blocks: Blocks, prepared: GpuExperts, tile: Tile, profile: Profile
) -> Tensor:
    """gate and up of every pair, [pairs, 2I] in the dtype of x; each token is quantized once."""
    from morphoquant_vllm.gpu import launch

    codes, rows = launch.quantize(x, modality, prepared.input, units=profile.units)
    return multiply(codes, rows, slots, blocks, prepared.gate_up, prepared.input_gain, x.dtype, tile, profile)


def multiply(
    codes: Tensor,
    rows: Tensor,
    slots: int,
    blocks: Blocks,
    weight: GpuWeight,
    gain: Tensor,
    dtype: torch.dtype,
    tile: Tile,
    profile: Profile,
) -> Tensor:
    """Products [pairs, N] of codes int8 [pairs / slots, K] with each pair's expert; gain float32 [E, R]."""
    from morphoquant_vllm.gpu.kernels.experts import experts_gemm
    from morphoquant_vllm.gpu.launcher import Launch

    pairs, (count, rows_count, outputs) = codes.shape[0] * slots, weight.absorbed_bias.shape
    out = torch.empty((pairs, outputs), dtype=dtype, device=codes.device)
    arguments = {
        "codes_ptr": codes,
        "rows_ptr": rows,
        "out_ptr": out,
        "expert_ptr": blocks.expert,
        "pair_ptr": blocks.pair,
        "pairs": pairs,
        "slots": slots,
        "weight_ptr": weight.codes.view(torch.int8),
        "scale_ptr": weight.scale,
        # Without two-level scales the kernel does not read it, but it must be a pointer.
        "channel_scale_ptr": weight.channel_scale if weight.two_level else gain,
        "gain_ptr": gain,
        "absorbed_bias_ptr": weight.absorbed_bias,
        "N": outputs,
        "K": codes.shape[1],
        "R": rows_count,
        "E": count,
        **constants(tile, codes.shape[1], group_size_of(weight), weight.two_level, profile.inline_assembly),
    }
    grid = (blocks.expert.numel() * -(-outputs // tile.block_n), 1)
    Launch(experts_gemm, grid, arguments, {"num_warps": tile.warps, "enable_fp_fusion": True}).run()
    return out


def group_size_of(weight: GpuWeight) -> int:
    """G of stacked weights, as layout.group_size_of."""
    return layout.group_size_of(GpuWeight(*(field[0] for field in weight)))


def constants(tile: Tile, channels: int, group_size: int, two_level: bool, inline_assembly: bool) -> dict[str, Any]:
    """The compile-time arguments of the product."""
    width = layout.tile_channels(group_size, two_level)
    return {
        "G": group_size,
        "P": width,
        "TILE_N": layout.TILE_N,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "EVEN_K": channels % (width * (1 + two_level)) == 0,
        "ASM": inline_assembly,
        "STAGES": tile.stages,
        "UNROLL": tile.unroll,
        "JOINED": tile.joined,
        "TWO_LEVEL": two_level,
    }


def quantize(products: Tensor, modality: Tensor, ids: Tensor, activation: GpuActivation) -> tuple[Tensor, Tensor]:
    """Codes int8 [pairs, I] and rows int32 [pairs] of silu(gate) * up of products [pairs, 2I]."""
    from morphoquant_vllm.gpu import quantize_launch
    from morphoquant_vllm.gpu.kernels.experts import quantize_pairs
    from morphoquant_vllm.gpu.launcher import Launch

    count, _, channels = activation.inverse.shape
    pairs = products.shape[0]
    codes = torch.empty((pairs, channels), dtype=torch.int8, device=products.device)
    rows = torch.empty((pairs,), dtype=torch.int32, device=products.device)
    arguments = {
        "x_ptr": products,
        "modality_ptr": modality,
        "ids_ptr": ids,
        "codes_ptr": codes,
        "rows_ptr": rows,
        "x_stride": products.stride(0),
        **quantize_launch.table_arguments(activation),
        "order_ptr": quantize_launch.order_argument(activation),
        "E": count,
        "BLOCK_K": quantize_launch.QUANTIZE_BLOCK_K,
        "IN_ORDER": activation.in_order,
    }
    grid = (pairs * -(-channels // quantize_launch.QUANTIZE_BLOCK_K), 1)
    options = {"num_warps": quantize_launch.QUANTIZE_WARPS, "enable_fp_fusion": False}
    Launch(quantize_pairs, grid, arguments, options).run()
    return codes, rows


def add(products: Tensor, weights: Tensor, ids: Tensor, count: int, y: Tensor) -> None:
    """Write y [M, N], the weighted sums of each token's products float32 [pairs, N]."""
    from morphoquant_vllm.gpu.kernels.experts import add_pairs
    from morphoquant_vllm.gpu.launcher import Launch

    tokens, outputs = y.shape
    arguments = {
        "products_ptr": products,
        "weights_ptr": weights,
        "ids_ptr": ids,
        "y_ptr": y,
        "slots": weights.shape[1],
        "N": outputs,
        "E": count,
        "BLOCK_N": ADD_BLOCK_N,
    }
    options = {"num_warps": ADD_WARPS, "enable_fp_fusion": True}
    Launch(add_pairs, (tokens, -(-outputs // ADD_BLOCK_N)), arguments, options).run()
