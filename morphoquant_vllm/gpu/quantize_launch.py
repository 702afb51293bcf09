"""How a token's activation is quantized: which kernel serves how many tokens, and its launch.

tokens     channels in order   kernel                 a program quantizes
1 to 127   either              quantize_activation    QUANTIZE_BLOCK_K channels of one token
from 128   yes                 quantize_in_order      QUANTIZE_BLOCK_K channels of IN_ORDER_TOKENS tokens
from 128   no                  quantize_tokens        whole tokens, so many that each multiprocessor gets four programs
from 128   no, of a wide row   quantize_activation    as for few
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation, quantize_in_order, quantize_tokens
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.layout import GpuActivation

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
# What differs from call to call: of all kernels, and of those whose programs take several tokens.
VARYING = ("x_ptr", "modality_ptr", "codes_ptr", "rows_ptr", "x_stride")
VARYING_OF_MANY = (*VARYING, "M", "tokens")


@dataclass(frozen=True)
class Quantizer:
    """What a quantizer's launches have in common."""

    activation: GpuActivation
    # Of silu(gate) * up, where x [M, 2K] holds gate and up side by side.
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
        """The kernel that serves so many tokens."""
        if tokens < WHOLE_TOKENS:
            return quantize_activation
        if self.activation.in_order:
            return quantize_in_order
        widest = WIDEST_SILU_TOKEN if self.silu_mul else WIDEST_TOKEN
        return quantize_tokens if triton.next_power_of_2(self.in_features) <= widest else quantize_activation

    def needs_alignment(self, tokens: int) -> bool:
        """Whether the kernel reads x as `aligned` makes it."""
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
        """The launch for x [M, K], M >= 1, whose channels lie side by side.

        It writes codes int8 [M, K] and rows int32 [M]. `quantize_in_order` needs x as `aligned` makes it.
        """
        tokens = x.shape[0]
        kernel = self.kernel(tokens)
        programs, each = self.programs(kernel, tokens)
        blocks, intervals = self.activation.massive_channel.shape
        arguments = {
            "x_ptr": x,
            "modality_ptr": modality,
            "inverse_ptr": self.activation.inverse,
            "centre_ptr": self.activation.centre,
            "limit_ptr": self.activation.limit,
            "massive_channel_ptr": self.activation.massive_channel,
            "massive_low_ptr": self.activation.massive_low,
            "massive_high_ptr": self.activation.massive_high,
            "codes_ptr": codes,
            "rows_ptr": rows,
            "x_stride": x.stride(0),
            "K": self.in_features,
            "R": self.activation.gain.numel(),
            "B": blocks,
            "J": intervals,
            "BLOCK_K": QUANTIZE_BLOCK_K,
            "SILU_MUL": self.silu_mul,
            "PDL": self.pdl,
        }
        if kernel is not quantize_in_order:
            # A pointer that is not read must still be one.
            unread = self.activation.in_order
            arguments["order_ptr"] = self.activation.massive_channel if unread else self.activation.channel_order
        if kernel is quantize_activation:
            arguments["IN_ORDER"] = self.activation.in_order
        else:
            arguments |= {"M": tokens, "tokens": each}
        if kernel is quantize_tokens:
            width = triton.next_power_of_2(self.in_features)
            arguments |= {"WIDTH": width, "BLOCK_K": gather_block(width)}
        warps = GATHER_WARPS if kernel is quantize_tokens else QUANTIZE_WARPS
        # Subtract and multiply must each round, as in the reference.
        return Launch(kernel, (programs, 1), arguments, {"num_warps": warps, "enable_fp_fusion": False})


def gather_block(width: int) -> int:
    """Channels that a program gathers at a time, of whole tokens of up to `width` channels."""
    return min(width, 32 * GATHER_WARPS * GATHER_ELEMENTS)


def aligned(x: Tensor) -> Tensor:
    """x [M, K] as `quantize_in_order` reads it: its tokens on 16 bytes, a multiple of 16 channels apart."""
    if x.stride(0) % IN_ORDER_ALIGNMENT or x.data_ptr() % IN_ORDER_ALIGNMENT:
        return x.new_empty(x.shape).copy_(x)
    return x
