"""The two ops on a GPU through Triton's JIT: for tests, tools and layers that are not bound; see bound.py.

They allocate, choose tiles and launch. They do not synchronise with the host and do not measure. Allocations depend on
shapes, strides and addresses alone, so a captured CUDA graph replays into the same memory. The kernels are not
specialised on M, so a new number of tokens compiles nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.gpu import adding_launch
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight, group_size_of
from morphoquant_vllm.gpu.product_launch import Product, programs
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS, Quantizer, aligned
from morphoquant_vllm.gpu.tiles import Tile, splits_of


def quantize(
    x: Tensor,
    modality: Tensor,
    activation: GpuActivation,
    silu_mul: bool = False,
    pdl: bool = False,
    *,
    units: int,
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] of x [M, K], and the row of each token, int32 [M]. modality: int32 [M].

    `silu_mul`: x [M, 2K] holds gate and up side by side, and silu(gate) * up is quantized. `pdl`: the next kernel may
    start while this one ends. `units`: multiprocessors of the device. Raises ValueError for x of another width.
    """
    quantizer = Quantizer(activation, silu_mul, pdl, units)
    tokens = x.shape[0]
    if x.shape[1] != quantizer.width:
        raise ValueError(f"the quantizer needs x as [M, {quantizer.width}], got {list(x.shape)}")
    codes = torch.empty((tokens, activation.in_features), dtype=torch.int8, device=x.device)
    rows = torch.empty((tokens,), dtype=torch.int32, device=x.device)
    if tokens:
        if x.stride(1) != 1:
            x = x.contiguous()
        if quantizer.needs_alignment(tokens):
            x = aligned(x)
        quantizer.launch(x, modality, codes, rows).run()
    return codes, rows


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
    counters: Tensor | None = None,
) -> Tensor:
    """y [M, N] in `dtype` from codes int8 [M, K] and rows int32 [M], with a given tile and split of K.

    `pdl`: start each kernel while the one before ends; see kernels/pdl.py. `counters`: zeros, int32, of a tile that
    adds the parts itself; without them they are made.
    """
    product = Product(weight, gain, inline_assembly, pdl)
    tokens = codes.shape[0]
    y = torch.empty((tokens, product.out_features), dtype=dtype, device=codes.device)
    if not tokens:
        return y
    if splits == 1:
        product.multiply(codes, rows, bias, y, tile, splits).run()
    else:
        parts = torch.empty((splits, tokens, product.out_features), dtype=product.sums, device=codes.device)
        if tile.adds_splits:
            if counters is None:
                counters = codes.new_zeros(programs(tile, tokens, product.out_features), dtype=torch.int32)
            adding_launch.multiply_and_add(product, codes, rows, bias, parts, y, counters, tile).run()
        else:
            product.multiply(codes, rows, bias, parts, tile, splits).run()
            product.reduce(parts, rows, bias, y).run()
    return y


def linear(
    x: Tensor,
    modality: Tensor,
    weight: GpuWeight,
    activation: GpuActivation,
    bias: Tensor | None,
    profile: Profile,
    silu_mul: bool = False,
) -> Tensor:
    """y [M, N] in the dtype of x [M, K].

    `silu_mul`: x is [M, 2K], and the layer's input is silu(gate) * up.
    """
    codes, rows = quantize(x, modality, activation, silu_mul, profile.pdl, units=profile.units)
    return multiply(codes, rows, weight, activation.gain, bias, x.dtype, profile)


def multiply(
    codes: Tensor,
    rows: Tensor,
    weight: GpuWeight,
    gain: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    profile: Profile,
) -> Tensor:
    """y [M, N] as `matmul`, with the tile of the tile table for this device and shape."""
    tokens = codes.shape[0]
    tile = profile.architecture.tile(tokens, group_size_of(weight), weight.two_level)
    splits = splits_of(tile, max(1, tokens), weight.absorbed_bias.shape[1], weight.codes.shape[1], profile.units)
    return matmul(codes, rows, weight, gain, bias, dtype, tile, splits, profile.inline_assembly, profile.pdl)


def warm(
    weight: GpuWeight, activation: GpuActivation, bias: Tensor | None, dtype: torch.dtype, profile: Profile
) -> None:
    """Compile all kernels that this layer can need with activations of `dtype`, by running them."""
    device = weight.codes.device
    modality = torch.zeros(WHOLE_TOKENS, dtype=torch.int32, device=device)
    for silu_mul in (True, False):
        x = torch.zeros((WHOLE_TOKENS, activation.in_features * (1 + silu_mul)), dtype=dtype, device=device)
        for tokens in (WHOLE_TOKENS, 1):
            codes, rows = quantize(x[:tokens], modality, activation, silu_mul, profile.pdl, units=profile.units)
    settings = (profile.inline_assembly, profile.pdl)
    for tile in profile.architecture.tiles_of(group_size_of(weight), weight.two_level):
        for splits in {1, min(tile.max_splits, 2)}:
            # A layer with a bias may be called without it.
            for term in {None, bias}:
                matmul(codes, rows, weight, activation.gain, term, dtype, tile, splits, *settings)
