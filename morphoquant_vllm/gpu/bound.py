"""A layer bound to its kernels when it is loaded, so that a call costs the host little: one for each layer.

    load   BoundLayer(...)  every kernel that the layer can need is compiled, run once, and kept
    call   M --bisect--> product of its tile --table--> splits of K
           allocate y and one scratch -> launch the quantizer, the product, (the reduction)

    scratch   | codes int8 [M, K] | rows int32 [M] | parts of a split K, 32 bits [splits, M, N] |

In a call nothing is hashed, and Triton and the driver are asked for the current stream alone. What is allocated depends
on shapes and the order of calls alone, so that a captured CUDA graph replays into the same memory.

Inputs that the compiled kernels do not fit, of another dtype or without a stride of 1, go through launch.py.
"""

from __future__ import annotations

import logging
import sys
from bisect import bisect_left
from collections.abc import Callable
from functools import cache, partial

import torch
import triton
from torch import Tensor

from morphoquant_vllm import environment
from morphoquant_vllm.gpu import bound_norm, launch, norm_launch
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.launcher import CompiledLaunch, Launch, compiled
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight, group_size_of
from morphoquant_vllm.gpu.norm_launch import NormQuantizer
from morphoquant_vllm.gpu.product_launch import REDUCE_BLOCK_N, Product, programs
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS, Quantizer, aligned
from morphoquant_vllm.gpu.tiles import Tile, splits_of

logger = logging.getLogger("vllm.morphoquant_vllm.gpu.bound")

# Triton passes how far tokens lie apart in 32 bits.
MAX_STRIDE = 2**31 - 1
# Where in the scratch a part may begin: kernels take addresses for multiples of that.
ALIGNMENT = 16
BYTES_OF_SUM = 4


# Fills codes and rows, at the last two addresses, of x and modality on a stream.
Quantize = Callable[[int, Tensor, Tensor, int, int], None]


class UnknownFormError(Exception):
    """Triton launches compiled kernels in another way, or interprets them: there is nothing to bind."""


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
        # Of rows too wide for whole tokens the kernel is that of few.
        self.takes_several = "tokens" in many.arguments
        self.programs_of_one, _ = quantizer.programs(few.kernel, 1)
        self.programs_of_many = partial(quantizer.programs, many.kernel)
        self.few = _compiled(few, "x_stride")
        self.many = _compiled(many, "tokens" if self.takes_several else "x_stride")

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
    """y [M, N] in `dtype` of codes and rows, by one tile; with the layer's own `bias`, or without any."""

    def __init__(
        self,
        product: Product,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        tile: Tile,
        splits: tuple[int, ...],
    ) -> None:
        """Compiles its kernels. Raises UnknownFormError.

        `splits`: parts of K by the number of tiles of tokens, from 1 on; of more tiles those of the last.
        """
        self.tile, self.splits, self.out_features = tile, splits, product.out_features
        self.reduce_programs = -(-self.out_features // REDUCE_BLOCK_N)
        device = product.gain.device
        codes = torch.zeros((1, in_features), dtype=torch.int8, device=device)
        rows = torch.zeros(1, dtype=torch.int32, device=device)
        y = torch.empty((1, self.out_features), dtype=dtype, device=device)
        self.whole = _compiled(product.multiply(codes, rows, bias, y, tile, 1), "splits")
        if max(splits) > 1:
            parts = torch.empty((2, 1, self.out_features), dtype=product.sums, device=device)
            self.partial = _compiled(product.multiply(codes, rows, bias, parts, tile, 2), "splits")
            self.reduce = _compiled(product.reduce(parts, rows, bias, y), "splits")

    def splits_of(self, tokens: int) -> int:
        """Parts of K for so many tokens."""
        token_tiles = -(-tokens // self.tile.block_m)
        return self.splits[min(token_tiles, len(self.splits)) - 1]

    def __call__(self, stream: int, codes: int, rows: int, parts: int, y: int, tokens: int, splits: int) -> None:
        """Fill y, M >= 1; all tensors by their addresses."""
        grid = programs(self.tile, tokens, self.out_features)
        if splits == 1:
            self.whole(grid, 1, stream, codes, rows, y, tokens, 1)
        else:
            self.partial(grid, splits, stream, codes, rows, parts, tokens, splits)
            self.reduce(tokens, self.reduce_programs, stream, parts, rows, y, tokens, splits)


class BoundLayer:
    """One layer, for activations of `dtype`; see the module. The ops' handle is its absorbed bias, float32 [R, N].

    It keeps all tensors of the layer but that one: whoever holds the handle holds the layer.
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
        self.plain = PlainLayer(weight, activation, profile)
        self.bias, self.bias_address = bias, 0 if bias is None else bias.data_ptr()
        self.in_features, self.out_features = activation.in_features, weight.absorbed_bias.shape[1]
        self.stream = current_stream_of(weight.codes.device)
        self.quantizers = [
            BoundQuantizer(Quantizer(activation, silu_mul, profile.pdl, profile.units), dtype)
            for silu_mul in (False, True)
        ]
        # The graph pass that needs it is off by default.
        wanted = environment.fusion()
        norm = NormQuantizer(activation, profile.pdl, profile.units)
        self.norm = bound_norm.bind_norm(norm, dtype) if wanted else None
        product = Product(weight, activation.gain, profile.inline_assembly, profile.pdl)
        self.bounds: list[int] = []
        self.products: dict[bool, list[BoundProduct]] = {False: [], True: []}
        steps = weight.codes.shape[1]
        for tile in profile.architecture.tiles_of(group_size_of(weight), weight.two_level):
            self.bounds.append(sys.maxsize if tile.max_tokens is None else tile.max_tokens)
            splits = splits_by_tiles(tile, product.out_features, steps, profile.units)
            # A layer with a bias may be called without it.
            for term in [None] if bias is None else [None, bias]:
                bound = BoundProduct(product, self.in_features, term, dtype, tile, splits)
                self.products[term is not None].append(bound)

    def linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of x [M, K]; the ops' checks are done."""
        if self._takes(x, bias, silu_mul=False):
            return self._run(x, modality, bias is not None, self.quantizers[False])
        return self.plain.linear(x, modality, handle, bias)

    def silu_mul_linear(self, gate_up: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of silu(gate) * up, gate_up [M, 2K]."""
        if self._takes(gate_up, bias, silu_mul=True):
            return self._run(gate_up, modality, bias is not None, self.quantizers[True])
        return self.plain.silu_mul_linear(gate_up, modality, handle, bias)

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
        norm, own_bias = self.norm, bias is None or bias.data_ptr() == self.bias_address
        if norm is None or not own_bias or not x.shape[0] or not norm.takes(x, residual, norm_weight):
            return self.plain.norm_linear(x, residual, norm_weight, epsilon, modality, handle, bias)
        total = None if residual is None else x.new_empty(x.shape)

        def quantize(stream: int, x: Tensor, modality: Tensor, codes: int, rows: int) -> None:
            norm(stream, x, residual, norm_weight, epsilon, modality, codes, rows, total)

        return self._run(x, modality, bias is not None, quantize), total

    def _takes(self, x: Tensor, bias: Tensor | None, silu_mul: bool) -> bool:
        own_bias = bias is None or bias.data_ptr() == self.bias_address
        return own_bias and x.shape[0] > 0 and self.quantizers[silu_mul].takes(x)

    def _run(self, x: Tensor, modality: Tensor, has_bias: bool, quantizer: Quantize) -> Tensor:
        tokens = x.shape[0]
        product = self.products[has_bias][bisect_left(self.bounds, tokens)]
        splits = product.splits_of(tokens)
        sizes = scratch_sizes(tokens, self.in_features, self.out_features, splits)
        y = x.new_empty((tokens, self.out_features))
        scratch = x.new_empty((sum(sizes),), dtype=torch.int8)
        codes = scratch.data_ptr()
        rows = codes + sizes[0]
        stream = self.stream()
        quantizer(stream, x, modality, codes, rows)
        product(stream, codes, rows, rows + sizes[1], y.data_ptr(), tokens, splits)
        return y


class PlainLayer:
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
) -> BoundLayer | PlainLayer:
    """The layer, bound if that is possible here; every kernel that it can need is compiled, by running it."""
    try:
        return BoundLayer(weight, activation, bias, dtype, profile)
    except UnknownFormError:
        _say_that_the_jit_serves()
    launch.warm(weight, activation, bias, dtype, profile)
    return PlainLayer(weight, activation, profile)


def quantized(x: Tensor, modality: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and rows int32 [M], M >= 1, as a bound layer makes them here; for the self-check."""
    codes = x.new_empty((x.shape[0], quantizer.in_features), dtype=torch.int8)
    rows = x.new_empty((x.shape[0],), dtype=torch.int32)
    try:
        quantize = BoundQuantizer(quantizer, x.dtype)
        quantize(current_stream_of(x.device)(), x, modality, codes.data_ptr(), rows.data_ptr())
    except UnknownFormError:
        return launch.quantize(x, modality, quantizer.activation, quantizer.silu_mul, quantizer.pdl, quantizer.units)
    return codes, rows


def multiplied(codes: Tensor, rows: Tensor, product: Product, dtype: torch.dtype, tile: Tile, splits: int) -> Tensor:
    """y [M, N] of codes and rows, M >= 1, without a bias, as a bound layer makes it here; for the self-check."""
    tokens = codes.shape[0]
    y = codes.new_empty((tokens, product.out_features), dtype=dtype)
    parts = codes.new_empty((splits, tokens, product.out_features), dtype=product.sums)
    try:
        multiply = BoundProduct(product, codes.shape[1], None, dtype, tile, (splits,))
        stream = current_stream_of(codes.device)()
        multiply(stream, codes.data_ptr(), rows.data_ptr(), parts.data_ptr(), y.data_ptr(), tokens, splits)
    except UnknownFormError:
        settings = (tile, splits, product.inline_assembly, product.pdl)
        return launch.matmul(codes, rows, product.weight, product.gain, None, dtype, *settings)
    return y


@cache
def _say_that_the_jit_serves() -> None:
    logger.warning(
        "Triton %s does not launch compiled kernels as this release knows it: its slower launch serves. "
        "Outside CUDA graphs the GPU then waits for the CPU.",
        triton.__version__,
    )


def _compiled(described: Launch, last_varying: str) -> CompiledLaunch:
    """The compiled launch, whose arguments up to `last_varying` are given at each call. Raises UnknownFormError."""
    found = compiled(described, described.kernel.arg_names.index(last_varying) + 1)
    if found is None:
        raise UnknownFormError
    return found


def scratch_sizes(tokens: int, in_features: int, out_features: int, splits: int) -> tuple[int, int, int]:
    """Bytes of codes, of rows and of the parts of a split K, so that each begins at a multiple of ALIGNMENT."""
    parts = BYTES_OF_SUM * splits * tokens * out_features if splits > 1 else 0
    return _round_up(tokens * in_features), _round_up(4 * tokens), parts


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def current_stream_of(device: torch.device) -> Callable[[], int]:
    """What returns Triton's handle of the device's current stream. Raises UnknownFormError if there is no driver."""
    index = device.index if device.type == "cuda" else 0
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:
        raise UnknownFormError from None
    return partial(driver.get_current_stream, torch.cuda.current_device() if index is None else index)


def splits_by_tiles(tile: Tile, out_features: int, steps: int, units: int) -> tuple[int, ...]:
    """Parts of K by the number of tiles of tokens, from 1 to that from which the parts stay the same."""
    found: list[int] = []
    tokens = 0
    while not found or found[-1] > 1:
        tokens += tile.block_m
        found.append(splits_of(tile, tokens, out_features, steps, units))
    return tuple(found)
