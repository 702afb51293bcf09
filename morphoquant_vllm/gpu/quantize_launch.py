"""The launch of a layer's quantizer. The number of tokens decides which kernel runs.

tokens     channels in order   kernel                 a program quantizes
1 to 127   either              quantize_activation    QUANTIZE_BLOCK_K channels of one token
from 128   yes                 quantize_in_order      QUANTIZE_BLOCK_K channels of IN_ORDER_TOKENS tokens
from 128   no                  quantize_tokens        whole tokens, with four programs for each multiprocessor
from 128   no, wide tokens     quantize_activation    as for 1 to 127 tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation, quantize_in_order, quantize_tokens
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.layout import GpuActivation

# Codes per program. At M = 1 a token has enough programs for the whole device, and each has enough work to hide its
# start.
QUANTIZE_BLOCK_K = 1024
QUANTIZE_WARPS = 4
# From this many tokens on a program quantizes whole tokens; and the number of such programs for each multiprocessor.
WHOLE_TOKENS = 128
QUANTIZE_PROGRAMS = 4
# The widest token that such a program holds, in 16 bit: 64 KiB of shared memory. Several programs share a wider one.
WIDEST_TOKEN = 32768
# The same with silu(gate) * up: registers would not hold more.
WIDEST_SILU_TOKEN = 16384
# Warps of such a program, and the channels that each thread gathers at a time.
GATHER_WARPS = 16
GATHER_ELEMENTS = 16
# Tokens per program of `quantize_in_order`. Tokens must begin on this many bytes and lie a multiple of this many
# elements apart. Otherwise Triton does not load 16 bytes at a time.
IN_ORDER_TOKENS = 8
IN_ORDER_ALIGNMENT = 16


@dataclass(frozen=True)
class Quantizer:
    """The settings that all launches of a quantizer share."""

    activation: GpuActivation
    # Whether x [M, 2K] holds gate and up side by side, and silu(gate) * up is quantized.
    silu_mul: bool
    # Whether the next kernel may start while this one ends.
    pdl: bool
    units: int  # multiprocessors of the device

    @property
    def in_features(self) -> int:
        """K."""
        return self.activation.in_features

    @property
    def width(self) -> int:
        """Channels of x."""
        return self.in_features * (1 + self.silu_mul)

    def kernel(self, tokens: int) -> Any:
        """The kernel for this many tokens."""
        if tokens < WHOLE_TOKENS:
            return quantize_activation
        if self.activation.in_order:
            return quantize_in_order
        widest = WIDEST_SILU_TOKEN if self.silu_mul else WIDEST_TOKEN
        return quantize_tokens if triton.next_power_of_2(self.in_features) <= widest else quantize_activation

    def needs_alignment(self, tokens: int) -> bool:
        """Whether the kernel for this many tokens needs x aligned as by `aligned`."""
        return self.kernel(tokens) is quantize_in_order

    def programs(self, kernel: Any, tokens: int) -> tuple[int, int]:
        """How many programs there are, and how many tokens each takes."""
        parts = -(-self.in_features // QUANTIZE_BLOCK_K)
        if kernel is quantize_activation:
            return tokens * parts, 1
        if kernel is quantize_in_order:
            return -(-tokens // IN_ORDER_TOKENS) * parts, IN_ORDER_TOKENS
        each = -(-tokens // (QUANTIZE_PROGRAMS * self.units))
        return -(-tokens // each), each

    def launch(self, x: Tensor, modality: Tensor, codes: Tensor, rows: Tensor) -> Launch:
        """The launch for x [M, K], M >= 1, whose channels are contiguous.

        It writes codes int8 [M, K] and rows int32 [M]. `quantize_in_order` needs x as `aligned` makes it.
        """
        tokens = x.shape[0]
        kernel = self.kernel(tokens)
        programs, each = self.programs(kernel, tokens)
        arguments = {
            "x_ptr": x,
            "modality_ptr": modality,
            "codes_ptr": codes,
            "rows_ptr": rows,
            "x_stride": x.stride(0),
            **table_arguments(self.activation),
            "BLOCK_K": QUANTIZE_BLOCK_K,
            "SILU_MUL": self.silu_mul,
            "PDL": self.pdl,
        }
        if kernel is not quantize_in_order:
            arguments["order_ptr"] = order_argument(self.activation)
        if kernel is quantize_activation:
            arguments["IN_ORDER"] = self.activation.in_order
        else:
            arguments |= {"M": tokens, "tokens": each}
        if kernel is quantize_tokens:
            width = triton.next_power_of_2(self.in_features)
            arguments |= {"WIDTH": width, "BLOCK_K": gather_block(width)}
        warps = GATHER_WARPS if kernel is quantize_tokens else QUANTIZE_WARPS
        # Subtraction and multiplication must each round, as in the reference.
        return Launch(kernel, (programs, 1), arguments, {"num_warps": warps, "enable_fp_fusion": False})


def table_arguments(activation: GpuActivation) -> dict[str, Any]:
    """The kernel arguments of an activation record, also of a stacked one; the channel order is not among them."""
    rows, channels = activation.inverse.shape[-2:]
    blocks, intervals = activation.massive_channel.shape[-2:]
    return {
        "inverse_ptr": activation.inverse,
        "centre_ptr": activation.centre,
        "limit_ptr": activation.limit,
        "massive_channel_ptr": activation.massive_channel,
        "massive_low_ptr": activation.massive_low,
        "massive_high_ptr": activation.massive_high,
        "K": channels,
        "R": rows,
        "B": blocks,
        "J": intervals,
    }


def order_argument(activation: GpuActivation) -> Tensor:
    """The channel order; if channels come in order no kernel reads it, but it must be a pointer."""
    return activation.massive_channel if activation.in_order else activation.channel_order


def gather_block(width: int) -> int:
    """Channels that a program of whole tokens gathers at a time, for tokens of up to `width` channels."""
    return min(width, 32 * GATHER_WARPS * GATHER_ELEMENTS)


def aligned(x: Tensor) -> Tensor:
    """x [M, K] for `quantize_in_order`: tokens begin on 16 bytes and lie a multiple of 16 channels apart."""
    if x.stride(0) % IN_ORDER_ALIGNMENT or x.data_ptr() % IN_ORDER_ALIGNMENT:
        return x.new_empty(x.shape).copy_(x)
    return x
