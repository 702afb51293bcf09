"""Layers that are bound to their kernels when they are loaded, so a call costs the host little.

    load   BoundLayer(...)  every kernel that the layer can need is compiled, run once, and kept
    call   M --bisect--> product of its tile --table--> splits of K
           allocate y and one scratch -> launch the quantizer, the product, (the reduction, if the tile does not add)
           from the M of the tile table's int8 entry: the quantizer, the unpacking, the int8 product

    scratch   | codes int8 [M, K] | rows int32 [M] | parts of a split K, 32 bits [splits, M, N] |

A call hashes nothing, and asks Triton and the driver for the current stream only. Allocations depend only on shapes and
the order of calls. So a captured CUDA graph replays into the same memory.

Inputs of another dtype or without a stride of 1 do not fit the compiled kernels. They go through launch.py.
"""

from __future__ import annotations

import logging
import sys
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor

from morphoquant_vllm import environment
from morphoquant_vllm.gpu import bound_norm, launch, norm_launch
from morphoquant_vllm.gpu.adding_launch import counters_of, most_counters
from morphoquant_vllm.gpu.bound_int8 import BoundInt8
from morphoquant_vllm.gpu.bound_kernels import (
    ALIGNMENT,
    BoundProduct,
    BoundQuantizer,
    current_stream_of,
    splits_by_tiles,
)
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.launcher import UnknownFormError
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight, group_size_of
from morphoquant_vllm.gpu.norm_launch import NormQuantizer
from morphoquant_vllm.gpu.product_launch import Product
from morphoquant_vllm.gpu.quantize_launch import Quantizer
from morphoquant_vllm.gpu.workspace import workspace_of

logger = logging.getLogger("vllm.morphoquant_vllm.gpu.bound")

BYTES_OF_SUM = 4


# Fills codes and rows, at the last two addresses, of x and modality on a stream.
Quantize = Callable[[int, Tensor, Tensor, int, int], None]


class BoundLayer:
    """One layer, for activations of `dtype`; see the module. The ops' handle is its absorbed bias, float32 [R, N].

    It keeps all tensors of the layer except the handle, whose holder keeps the layer alive.
    """

    def __init__(
        self,
        weight: GpuWeight,
        activation: GpuActivation,
        bias: Tensor | None,
        dtype: torch.dtype,
        profile: Profile,
    ) -> None:
        """Compiles and runs every kernel that the layer can need. Raises UnknownFormError."""
        self.jit = JitLayer(weight, activation, profile)
        self.bias, self.bias_address = bias, 0 if bias is None else bias.data_ptr()
        self.in_features, self.out_features = activation.in_features, weight.absorbed_bias.shape[1]
        self.stream = current_stream_of(weight.codes.device)
        self.quantizer, self.silu_mul_quantizer = (
            BoundQuantizer(Quantizer(activation, silu_mul, profile.pdl, profile.units), dtype)
            for silu_mul in (False, True)
        )
        # The graph pass that needs it is off by default.
        wanted = environment.fusion()
        norm = NormQuantizer(activation, profile.pdl, profile.units)
        self.norm = bound_norm.bind_norm(norm, dtype) if wanted else None
        product = Product(weight, activation.gain, profile.inline_assembly, profile.pdl)
        # A layer with a bias may be called without it.
        terms = [None] if bias is None else [None, bias]
        # The most tokens of each tile, and the products of the tiles in their order.
        self.most_tokens: list[int] = []
        self.products: dict[bool, list[BoundProduct]] = {False: [], True: []}
        k_tiles = weight.codes.shape[1]
        for tile in profile.architecture.tiles_of(group_size_of(weight), weight.two_level):
            self.most_tokens.append(sys.maxsize if tile.max_tokens is None else tile.max_tokens)
            splits = splits_by_tiles(tile, product.out_features, k_tiles, profile.units)
            adds = tile.adds_splits and max(splits) > 1
            counters = counters_of(weight.codes.device, most_counters(tile, profile.units)) if adds else None
            for term in terms:
                bound = BoundProduct(product, self.in_features, term, dtype, tile, splits, counters)
                self.products[term is not None].append(bound)
        self.int8_from = sys.maxsize
        int8_tile = profile.architecture.served_int8_tile(weight.two_level)
        if int8_tile is not None:
            self.int8_from = int8_tile.min_tokens or 1
            workspace = None if int8_tile.fused else workspace_of(weight.codes.device)
            self.int8 = {
                term is not None: BoundInt8(product, self.in_features, term, dtype, int8_tile, workspace)
                for term in terms
            }

    def linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of x [M, K]; the ops' checks are done."""
        if self._takes(x, bias, self.quantizer):
            return self._run(x, modality, bias is not None, self.quantizer)
        return self.jit.linear(x, modality, handle, bias)

    def silu_mul_linear(self, gate_up: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of silu(gate) * up, gate_up [M, 2K]."""
        if self._takes(gate_up, bias, self.silu_mul_quantizer):
            return self._run(gate_up, modality, bias is not None, self.silu_mul_quantizer)
        return self.jit.silu_mul_linear(gate_up, modality, handle, bias)

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        modality: Tensor,
        handle: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """y [M, N] of the RMSNorm of x [M, K], or of x + residual, and then that sum."""
        norm = self.norm
        if norm is None or not self._is_own(bias) or not x.shape[0] or not norm.takes(x, residual, norm_weight):
            return self.jit.norm_linear(x, residual, norm_weight, epsilon, modality, handle, bias)
        total = None if residual is None else x.new_empty(x.shape)

        def quantize(stream: int, x: Tensor, modality: Tensor, codes: int, rows: int) -> None:
            norm(stream, x, residual, norm_weight, epsilon, modality, codes, rows, total)

        return self._run(x, modality, bias is not None, quantize), total

    def _is_own(self, bias: Tensor | None) -> bool:
        return bias is None or bias.data_ptr() == self.bias_address

    def _takes(self, x: Tensor, bias: Tensor | None, quantizer: BoundQuantizer) -> bool:
        return self._is_own(bias) and x.shape[0] > 0 and quantizer.takes(x)

    def _run(self, x: Tensor, modality: Tensor, has_bias: bool, quantizer: Quantize) -> Tensor:
        tokens, stream = x.shape[0], self.stream()
        product = self.products[has_bias][bisect_left(self.most_tokens, tokens)]
        in_int8 = tokens >= self.int8_from and self.int8[has_bias].serves(stream)
        splits = 1 if in_int8 else product.splits_of(tokens)
        sizes = scratch_sizes(tokens, self.in_features, self.out_features, splits)
        y = x.new_empty((tokens, self.out_features))
        scratch = x.new_empty((sum(sizes),), dtype=torch.int8)
        codes = scratch.data_ptr()
        rows = codes + sizes[0]
        quantizer(stream, x, modality, codes, rows)
        if in_int8:
            self.int8[has_bias](stream, codes, rows, y.data_ptr(), tokens)
            return y
        product(stream, codes, rows, rows + sizes[1], y.data_ptr(), tokens, splits)
        return y


class JitLayer:
    """A layer that is launched by Triton's JIT at each call."""

    def __init__(self, weight: GpuWeight, activation: GpuActivation, profile: Profile) -> None:
        # Without the handle, which would otherwise never be freed.
        self.weight = weight._replace(absorbed_bias=weight.absorbed_bias.new_empty(0))
        self.activation, self.profile = activation, profile

    def linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """As that of BoundLayer."""
        weight = self.weight._replace(absorbed_bias=handle)
        return launch.linear(x, modality[: x.shape[0]], weight, self.activation, bias, self.profile)

    def silu_mul_linear(self, gate_up: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """As that of BoundLayer."""
        weight = self.weight._replace(absorbed_bias=handle)
        modality = modality[: gate_up.shape[0]]
        return launch.linear(gate_up, modality, weight, self.activation, bias, self.profile, silu_mul=True)

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        modality: Tensor,
        handle: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of BoundLayer."""
        records = self.weight._replace(absorbed_bias=handle), self.activation
        return norm_launch.norm_linear(
            x, residual, norm_weight, epsilon, modality[: x.shape[0]], *records, bias, self.profile
        )


def bind(
    weight: GpuWeight, activation: GpuActivation, bias: Tensor | None, dtype: torch.dtype, profile: Profile
) -> BoundLayer | JitLayer:
    """The layer, bound if that is possible here; every kernel that it can need is compiled, by running it."""
    if not weight.two_level:
        _say_that_two_level_is_faster()
    try:
        return BoundLayer(weight, activation, bias, dtype, profile)
    except UnknownFormError:
        _say_that_the_jit_serves()
    launch.warm(weight, activation, bias, dtype, profile)
    return JitLayer(weight, activation, profile)


@cache
def _say_that_two_level_is_faster() -> None:
    logger.info(
        "Layers have one scale for each group. Long prompts are faster on a GPU with two-level scales, as measured on "
        "one H200; `morphoquant convert` makes such a checkpoint of this one."
    )


@cache
def _say_that_the_jit_serves() -> None:
    logger.warning(
        "Triton %s launches compiled kernels in a way that this release does not know, so its slower launch serves. "
        "Outside CUDA graphs the GPU then waits for the CPU.",
        triton.__version__,
    )


def scratch_sizes(tokens: int, in_features: int, out_features: int, splits: int) -> tuple[int, int, int]:
    """Bytes of codes, of rows and of the parts of a split K; each begins at a multiple of ALIGNMENT."""
    parts = BYTES_OF_SUM * splits * tokens * out_features if splits > 1 else 0
    return _round_up(tokens * in_features), _round_up(4 * tokens), parts


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
