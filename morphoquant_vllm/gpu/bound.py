"""A layer bound to its kernels when it is loaded, so that a call costs the host little: one for each layer.

    load   BoundLayer(...)  every kernel that the layer can need is compiled, run once, and kept
    call   M --bisect--> product of its tile --table--> splits of K
           allocate codes, rows, (parts), y -> launch the quantizer, the product, (the reduction)

In a call nothing is hashed, and Triton and the driver are asked for the current stream alone. What is allocated depends
on shapes, strides and addresses alone, so that a captured CUDA graph replays into the same memory.

Inputs that the compiled kernels do not fit, of another dtype or without a stride of 1, go through launch.py.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from morphoquant_vllm.gpu import launch, product_launch, quantize_launch
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.kernels.act_quant import quantize_in_order
from morphoquant_vllm.gpu.launcher import bind
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight, group_size_of
from morphoquant_vllm.gpu.product_launch import REDUCE_BLOCK_N, Product
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS, Quantizer, aligned
from morphoquant_vllm.gpu.tiles import Tile, splits_of

# Triton passes how far tokens lie apart in 32 bits.
MAX_STRIDE = 2**31 - 1


class BoundQuantizer:
    """codes int8 [M, K] and rows int32 [M] of x [M, K] in `dtype`, or of silu(gate) * up of x [M, 2K]."""

    def __init__(self, quantizer: Quantizer, dtype: torch.dtype, stream: Callable[[], int]) -> None:
        self.in_features, self.width, self.dtype = quantizer.in_features, quantizer.width, dtype
        self.stream = stream
        device = quantizer.activation.inverse.device
        x = torch.zeros((WHOLE_TOKENS, quantizer.width), dtype=dtype, device=device)
        modality = torch.zeros(WHOLE_TOKENS, dtype=torch.int32, device=device)
        codes = torch.empty((WHOLE_TOKENS, self.in_features), dtype=torch.int8, device=device)
        rows = torch.empty(WHOLE_TOKENS, dtype=torch.int32, device=device)
        few = quantizer.launch(x[:1], modality, codes, rows)
        many = quantizer.launch(x, modality, codes, rows)
        self.in_order = many.kernel is quantize_in_order
        self.programs_of_few = partial(quantizer.programs, few.kernel)
        self.programs_of_many = partial(quantizer.programs, many.kernel)
        self.few = bind(few, quantize_launch.VARYING)
        # Of rows too wide for whole tokens the kernel is that of few.
        self.varies_tokens = "tokens" in many.arguments
        varying = quantize_launch.VARYING_OF_MANY if self.varies_tokens else quantize_launch.VARYING
        self.many = bind(many, varying)

    def takes(self, x: Tensor) -> bool:
        """Whether the compiled kernels fit x."""
        stride, between = x.stride()
        return x.dtype is self.dtype and between == 1 and stride <= MAX_STRIDE and x.shape[1] == self.width

    def __call__(self, x: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """M >= 1; x as `takes` wants it."""
        tokens = x.shape[0]
        codes = x.new_empty((tokens, self.in_features), dtype=torch.int8)
        rows = x.new_empty((tokens,), dtype=torch.int32)
        if tokens < WHOLE_TOKENS:
            programs, _ = self.programs_of_few(tokens)
            self.few((programs, 1), self.stream(), (x, modality, codes, rows, x.stride(0)))
            return codes, rows
        if self.in_order:
            x = aligned(x)
        programs, each = self.programs_of_many(tokens)
        sizes = (x.stride(0), tokens, each) if self.varies_tokens else (x.stride(0),)
        self.many((programs, 1), self.stream(), (x, modality, codes, rows, *sizes))
        return codes, rows


class BoundProduct:
    """y [M, N] in `dtype` of codes and rows, by one tile; the layer's own `bias` or None."""

    def __init__(
        self,
        product: Product,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        tile: Tile,
        splits: tuple[int, ...],
        stream: Callable[[], int],
    ) -> None:
        """`splits`: parts of K, by the number of tiles of tokens from 1 on; of more tiles those of the last."""
        self.tile, self.splits, self.stream = tile, splits, stream
        self.dtype, self.sums, self.out_features = dtype, product.sums, product.out_features
        self.reduce_programs = -(-self.out_features // REDUCE_BLOCK_N)
        device = product.gain.device
        codes = torch.zeros((1, in_features), dtype=torch.int8, device=device)
        rows = torch.zeros(1, dtype=torch.int32, device=device)
        y = torch.empty((1, self.out_features), dtype=dtype, device=device)
        self.whole = bind(product.multiply(codes, rows, bias, y, tile, 1), product_launch.VARYING)
        if max(splits) > 1:
            parts = torch.empty((2, 1, self.out_features), dtype=self.sums, device=device)
            self.partial = bind(product.multiply(codes, rows, bias, parts, tile, 2), product_launch.VARYING)
            self.reduce = bind(product.reduce(parts, rows, bias, y), product_launch.VARYING_OF_REDUCTION)

    def __call__(self, codes: Tensor, rows: Tensor, absorbed_bias: Tensor) -> Tensor:
        """M >= 1; absorbed_bias float32 [R, N], the layer's."""
        tokens = codes.shape[0]
        y = codes.new_empty((tokens, self.out_features), dtype=self.dtype)
        token_tiles = -(-tokens // self.tile.block_m)
        splits = self.splits[min(token_tiles, len(self.splits)) - 1]
        grid = (product_launch.programs(self.tile, tokens, self.out_features), splits)
        stream = self.stream()
        if splits == 1:
            self.whole(grid, stream, (codes, rows, absorbed_bias, y, tokens, 1))
            return y
        parts = codes.new_empty((splits, tokens, self.out_features), dtype=self.sums)
        self.partial(grid, stream, (codes, rows, absorbed_bias, parts, tokens, splits))
        self.reduce((tokens, self.reduce_programs), stream, (parts, rows, absorbed_bias, y, tokens, splits))
        return y


class BoundLayer:
    """One layer, for activations of `dtype`; see the module. The ops' handle is its absorbed bias, float32 [R, N].

    It keeps all tensors of the layer but that one: who holds the handle holds the layer.
    """

    def __init__(
        self,
        weight: GpuWeight,
        activation: GpuActivation,
        bias: Tensor | None,
        dtype: torch.dtype,
        profile: Profile,
    ) -> None:
        """Compiles and runs every kernel that the layer can need."""
        self.profile, self.dtype, self.activation = profile, dtype, activation
        device = weight.codes.device
        stream = current_stream_of(device)
        self.weight = weight._replace(absorbed_bias=weight.absorbed_bias.new_empty(0))
        self.bias = bias
        self.bias_address = 0 if bias is None else bias.data_ptr()
        self.quantizers = [
            BoundQuantizer(Quantizer(activation, silu_mul, profile.pdl, profile.units), dtype, stream)
            for silu_mul in (False, True)
        ]
        product = Product(weight, activation.gain, profile.inline_assembly, profile.pdl)
        self.bounds: list[int] = []
        self.products: dict[bool, list[BoundProduct]] = {False: [], True: []}
        steps = weight.codes.shape[1]
        for tile in profile.architecture.tiles_of(group_size_of(weight), weight.two_level):
            self.bounds.append(sys.maxsize if tile.max_tokens is None else tile.max_tokens)
            splits = splits_by_tiles(tile, product.out_features, steps, profile.units)
            # A layer with a bias may be called without it.
            for term in [None] if bias is None else [None, bias]:
                bound = BoundProduct(product, activation.in_features, term, dtype, tile, splits, stream)
                self.products[term is not None].append(bound)

    def linear(self, x: Tensor, modality: Tensor, absorbed_bias: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of x [M, K]; the ops' checks are done."""
        return self._run(x, modality, absorbed_bias, bias, False)

    def silu_mul_linear(self, x: Tensor, modality: Tensor, absorbed_bias: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of silu(gate) * up, x [M, 2K]."""
        return self._run(x, modality, absorbed_bias, bias, True)

    def _run(self, x: Tensor, modality: Tensor, absorbed_bias: Tensor, bias: Tensor | None, silu_mul: bool) -> Tensor:
        tokens = x.shape[0]
        quantizer = self.quantizers[silu_mul]
        if not tokens or not quantizer.takes(x) or (bias is not None and bias.data_ptr() != self.bias_address):
            weight = self.weight._replace(absorbed_bias=absorbed_bias)
            return launch.linear(x, modality, weight, self.activation, bias, self.profile, silu_mul)
        codes, rows = quantizer(x, modality)
        products = self.products[bias is not None]
        return products[bisect_left(self.bounds, tokens)](codes, rows, absorbed_bias)


def current_stream_of(device: torch.device) -> Callable[[], int]:
    """What returns Triton's handle of the device's current stream; the interpreter's CPU has none."""
    if device.type == "cpu":
        return int
    index = torch.cuda.current_device() if device.index is None else device.index
    return partial(triton.runtime.driver.active.get_current_stream, index)


def splits_by_tiles(tile: Tile, out_features: int, steps: int, units: int) -> tuple[int, ...]:
    """Parts of K by the number of tiles of tokens, from 1 to that from which the parts stay the same."""
    found: list[int] = []
    tokens = 0
    while not found or found[-1] > 1:
        tokens += tile.block_m
        found.append(splits_of(tile, tokens, out_features, steps, units))
    return tuple(found)
