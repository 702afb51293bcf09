"""The kernels of a bound layer: the quantizer, and the product by one tile; compiled, all memory by its address."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from morphoquant_vllm.gpu import adding_launch
from morphoquant_vllm.gpu.adding_launch import Counters
from morphoquant_vllm.gpu.launcher import UnknownFormError, must_be_compiled
from morphoquant_vllm.gpu.product_launch import REDUCE_BLOCK_N, Product, programs
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS, Quantizer, aligned
from morphoquant_vllm.gpu.tiles import Tile, splits_of

# Triton passes the distance of tokens in 32 bits.
MAX_STRIDE = 2**31 - 1
# Compiled kernels assume that addresses are multiples of this many bytes.
ALIGNMENT = 16


class BoundQuantizer:
    """Codes int8 [M, K] and rows int32 [M] of x [M, K] in `dtype`, or of silu(gate) * up of x [M, 2K]."""

    def __init__(self, quantizer: Quantizer, dtype: torch.dtype) -> None:
        """Compiles both kernels. Raises UnknownFormError."""
        self.in_features, self.width, self.dtype = quantizer.in_features, quantizer.width, dtype
        device = quantizer.activation.inverse.device
        x = torch.zeros((WHOLE_TOKENS, quantizer.width), dtype=dtype, device=device)
        modality = torch.zeros(WHOLE_TOKENS, dtype=torch.int32, device=device)
        codes = torch.empty((WHOLE_TOKENS, self.in_features), dtype=torch.int8, device=device)
        rows = torch.empty(WHOLE_TOKENS, dtype=torch.int32, device=device)
        few = quantizer.launch(x[:1], modality, codes, rows)
        many = quantizer.launch(x, modality, codes, rows)
        self.needs_alignment = quantizer.needs_alignment(WHOLE_TOKENS)
        # Tokens too wide for a whole program take the kernel of few tokens.
        self.takes_several = "tokens" in many.arguments
        self.programs_of_one, _ = quantizer.programs(few.kernel, 1)
        self.programs_of_many = partial(quantizer.programs, many.kernel)
        self.few = must_be_compiled(few, "x_stride")
        self.many = must_be_compiled(many, "tokens" if self.takes_several else "x_stride")

    def takes(self, x: Tensor) -> bool:
        """Whether the compiled kernels fit x."""
        stride, between = x.stride()
        return x.dtype is self.dtype and between == 1 and stride <= MAX_STRIDE and x.shape[1] == self.width

    def __call__(self, stream: int, x: Tensor, modality: Tensor, codes: int, rows: int) -> None:
        """Fill codes and rows, at these addresses; M >= 1, x as `takes` wants it."""
        tokens = x.shape[0]
        if tokens < WHOLE_TOKENS:
            grid = tokens * self.programs_of_one
            self.few(grid, 1, stream, x.data_ptr(), modality.data_ptr(), codes, rows, x.stride(0))
            return
        if self.needs_alignment:
            x = aligned(x)
        grid, each = self.programs_of_many(tokens)
        sizes = (x.stride(0), tokens, each) if self.takes_several else (x.stride(0),)
        self.many(grid, 1, stream, x.data_ptr(), modality.data_ptr(), codes, rows, *sizes)


class BoundProduct:
    """y [M, N] in `dtype` of codes and rows, by one tile; with the layer's `bias`, or without any."""

    def __init__(
        self,
        product: Product,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        tile: Tile,
        splits: tuple[int, ...],
        counters: Counters | None = None,
    ) -> None:
        """Compiles its kernels. Raises UnknownFormError.

        `splits`: parts of K by the number of tiles of tokens, from 1 on; of more tiles those of the last. `counters`:
        as many as a split product has tiles, if the tile adds the parts itself.
        """
        self.tile, self.splits, self.out_features = tile, splits, product.out_features
        self.counters, self.counters_address = counters, 0
        self.reduce_programs = -(-self.out_features // REDUCE_BLOCK_N)
        device = product.gain.device
        codes = torch.zeros((1, in_features), dtype=torch.int8, device=device)
        rows = torch.zeros(1, dtype=torch.int32, device=device)
        y = torch.empty((1, self.out_features), dtype=dtype, device=device)
        self.whole = must_be_compiled(product.multiply(codes, rows, bias, y, tile, 1), "splits")
        if max(splits) > 1:
            parts = torch.empty((2, 1, self.out_features), dtype=product.sums, device=device)
            self.partial = must_be_compiled(product.multiply(codes, rows, bias, parts, tile, 2), "splits")
            self.reduce = must_be_compiled(product.reduce(parts, rows, bias, y), "splits")
            if counters is not None:
                self.counters_address = counters.memory.data_ptr()
                # With others: a stream may be using these.
                zeros = torch.zeros_like(counters.memory)
                adding = adding_launch.multiply_and_add(product, codes, rows, bias, parts, y, zeros, tile)
                self.adding = must_be_compiled(adding, "splits")

    def splits_of(self, tokens: int) -> int:
        """Number of parts of K for a number of tokens."""
        token_tiles = -(-tokens // self.tile.block_m)
        return self.splits[min(token_tiles, len(self.splits)) - 1]

    def __call__(self, stream: int, codes: int, rows: int, parts: int, y: int, tokens: int, splits: int) -> None:
        """Fill y, M >= 1; all tensors by their addresses."""
        grid = programs(self.tile, tokens, self.out_features)
        if splits == 1:
            self.whole(grid, 1, stream, codes, rows, y, tokens, 1)
        elif self.counters is not None and self.counters.turn.serves(stream):
            self.adding(grid, splits, stream, codes, rows, parts, y, self.counters_address, tokens, splits)
        else:
            self.partial(grid, splits, stream, codes, rows, parts, tokens, splits)
            self.reduce(tokens, self.reduce_programs, stream, parts, rows, y, tokens, splits)


def splits_by_tiles(tile: Tile, out_features: int, k_tiles: int, units: int) -> tuple[int, ...]:
    """Parts of K by the number of tiles of tokens, from 1 to that from which the parts stay the same."""
    found: list[int] = []
    tokens = 0
    while not found or found[-1] > 1:
        tokens += tile.block_m
        found.append(splits_of(tile, tokens, out_features, k_tiles, units))
    return tuple(found)


def current_stream_of(device: torch.device) -> Callable[[], int]:
    """A function that returns Triton's handle of the current stream. Raises UnknownFormError without a driver."""
    index = device.index if device.type == "cuda" else 0
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:
        raise UnknownFormError from None
    return partial(driver.get_current_stream, torch.cuda.current_device() if index is None else index)
