"""The single calls of a bound layer, launched as a bound layer launches them: for the self-check."""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.gpu import int8_path, launch
from morphoquant_vllm.gpu.adding_launch import Counters
from morphoquant_vllm.gpu.bound_int8 import BoundInt8
from morphoquant_vllm.gpu.bound_kernels import BoundProduct, BoundQuantizer, current_stream_of
from morphoquant_vllm.gpu.launcher import UnknownFormError
from morphoquant_vllm.gpu.product_launch import Product, programs
from morphoquant_vllm.gpu.quantize_launch import Quantizer
from morphoquant_vllm.gpu.tiles import Int8Tile, Tile
from morphoquant_vllm.gpu.workspace import Workspace


def quantized(x: Tensor, modality: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and rows int32 [M] of x, M >= 1, by a bound quantizer."""
    codes = x.new_empty((x.shape[0], quantizer.in_features), dtype=torch.int8)
    rows = x.new_empty((x.shape[0],), dtype=torch.int32)
    try:
        quantize = BoundQuantizer(quantizer, x.dtype)
        quantize(current_stream_of(x.device)(), x, modality, codes.data_ptr(), rows.data_ptr())
    except UnknownFormError:
        settings = (quantizer.silu_mul, quantizer.pdl)
        return launch.quantize(x, modality, quantizer.activation, *settings, units=quantizer.units)
    return codes, rows


def multiplied(codes: Tensor, rows: Tensor, product: Product, dtype: torch.dtype, tile: Tile, splits: int) -> Tensor:
    """y [M, N] of codes and rows, M >= 1, without a bias, by a bound product."""
    tokens = codes.shape[0]
    y = codes.new_empty((tokens, product.out_features), dtype=dtype)
    parts = codes.new_empty((splits, tokens, product.out_features), dtype=product.sums)
    try:
        adds = tile.adds_splits and splits > 1
        counters = Counters(codes.device, programs(tile, tokens, product.out_features)) if adds else None
        multiply = BoundProduct(product, codes.shape[1], None, dtype, tile, (splits,), counters)
        stream = current_stream_of(codes.device)()
        multiply(stream, codes.data_ptr(), rows.data_ptr(), parts.data_ptr(), y.data_ptr(), tokens, splits)
    except UnknownFormError:
        settings = (tile, splits, product.inline_assembly, product.pdl)
        return launch.matmul(codes, rows, product.weight, product.gain, None, dtype, *settings)
    return y


def multiplied_in_int8(
    codes: Tensor, rows: Tensor, product: Product, dtype: torch.dtype, tile: Int8Tile
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] as `multiplied`, by the int8 path; and the unpacked weights int8 [N', K'], or None for a fused tile."""
    tokens = codes.shape[0]
    y = codes.new_empty((tokens, product.out_features), dtype=dtype)
    workspace = None if tile.fused else Workspace(codes.device)
    if workspace is not None:
        workspace.grow(int8_path.workspace_bytes(product.weight))
    memory = None if workspace is None else workspace.memory
    try:
        multiply = BoundInt8(product, codes.shape[1], None, dtype, tile, workspace)
        multiply(current_stream_of(codes.device)(), codes.data_ptr(), rows.data_ptr(), y.data_ptr(), tokens)
    except UnknownFormError:
        assembly, pdl = product.inline_assembly, product.pdl
        if memory is not None:
            int8_path.unpack(product.weight, memory, inline_assembly=assembly, pdl=pdl)
        y = int8_path.int8_matmul(
            codes=codes,
            rows=rows,
            weight=product.weight,
            workspace=memory,
            gain=product.gain,
            bias=None,
            dtype=dtype,
            tile=tile,
            pdl=pdl,
        )
    return y, None if memory is None else int8_path.unpacked(product.weight, memory)
