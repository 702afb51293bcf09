"""RMSNorm and the quantizer after it in one launch, and the layer behind them through Triton's JIT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from morphoquant_vllm.gpu import launch
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.kernels.norm_quant import quantize_normed
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight
from morphoquant_vllm.gpu.quantize_launch import (
    QUANTIZE_PROGRAMS,
    WHOLE_TOKENS,
    aligned,
    gather_block,
    order_argument,
    table_arguments,
)
from morphoquant_vllm.numerics import norm

# The widest token that a program holds in registers. Wider ones are normed by torch.
WIDEST_NORM = 16384
# The widest token for which registers also hold the tables of both rows.
WIDEST_EARLY = 4096
# Channels that each thread of a program holds, if that takes no more than MOST_WARPS warps.
NORM_ELEMENTS = 8
MOST_WARPS = 16
# The arguments that vary from call to call: the first ones of the kernel.
VARYING = (
    *("x_ptr", "residual_ptr", "norm_weight_ptr", "modality_ptr", "codes_ptr", "rows_ptr", "new_residual_ptr"),
    *("epsilon", "x_stride", "residual_stride", "M", "tokens"),
)


@dataclass(frozen=True)
class NormQuantizer:
    """The settings that all launches of a layer's norm and quantizer share."""

    activation: GpuActivation
    # Whether the next kernel may start while this one ends.
    pdl: bool
    units: int  # multiprocessors of the device

    @property
    def in_features(self) -> int:
        """K."""
        return self.activation.in_features

    @property
    def fits(self) -> bool:
        """Whether a program can hold a token."""
        return self.in_features <= WIDEST_NORM

    def programs(self, tokens: int) -> tuple[int, int]:
        """How many programs there are, and how many tokens each takes."""
        each = -(-tokens // (QUANTIZE_PROGRAMS * self.units))
        return -(-tokens // each), each

    def launch(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        modality: Tensor,
        codes: Tensor,
        rows: Tensor,
        new_residual: Tensor | None,
        normed: Tensor | None = None,
    ) -> Launch:
        """The launch for x and residual [M, K], M >= 1, as `aligned` makes them; all of one dtype.

        It writes codes int8 [M, K] and rows int32 [M]. With a residual it writes new_residual [M, K]. With `normed` [M,
        K] it writes the norm's values there.
        """
        tokens = x.shape[0]
        programs, each = self.programs(tokens)
        width = triton.next_power_of_2(self.in_features)
        # The kernel neither reads nor writes it, but it must be a pointer.
        second = x if residual is None else residual
        arguments = {
            "x_ptr": x,
            "residual_ptr": second,
            "norm_weight_ptr": norm_weight,
            "modality_ptr": modality,
            "codes_ptr": codes,
            "rows_ptr": rows,
            "new_residual_ptr": x if new_residual is None else new_residual,
            "epsilon": epsilon,
            "x_stride": x.stride(0),
            "residual_stride": second.stride(0),
            "M": tokens,
            "tokens": each,
            "normed_ptr": self.activation.inverse if normed is None else normed,
            **table_arguments(self.activation),
            "order_ptr": order_argument(self.activation),
            "WIDTH": width,
            "BLOCK_K": gather_block(width),
            "ADD": residual is not None,
            "WRITE_NORMED": normed is not None,
            "IN_ORDER": self.activation.in_order,
            "EARLY": tokens < WHOLE_TOKENS and width <= WIDEST_EARLY,
            "PDL": self.pdl,
        }
        # Each operation must round by itself, as in the reference.
        options = {"num_warps": norm_warps(width), "enable_fp_fusion": False}
        return Launch(quantize_normed, (programs, 1), arguments, options)


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    quantizer: NormQuantizer,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [M, K] and rows int32 [M] of the norm of x [M, K], or of x + residual, and then the new residual.

    `norm_weight` [K] has the dtype of x. The norm's values are also written into `normed` [M, K]. Raises ValueError for
    another width or weight.
    """
    tokens, in_features = x.shape
    if in_features != quantizer.in_features or not quantizer.fits:
        raise ValueError(f"the norm needs x as [M, {quantizer.in_features}], {WIDEST_NORM} channels at most")
    if norm_weight.dtype != x.dtype or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"the norm's weight must be {x.dtype} [{in_features}]")
    codes = torch.empty((tokens, in_features), dtype=torch.int8, device=x.device)
    rows = torch.empty((tokens,), dtype=torch.int32, device=x.device)
    new_residual = None if residual is None else x.new_empty((tokens, in_features))
    if tokens:
        second = None if residual is None else _readable(residual)
        weight = _readable(norm_weight[None])[0]
        quantizer.launch(_readable(x), second, weight, epsilon, modality, codes, rows, new_residual, normed).run()
    return codes, rows, new_residual


def _readable(x: Tensor) -> Tensor:
    """x [M, K] as the kernel reads it, copied if it must be."""
    return aligned(x if x.stride(1) == 1 else x.contiguous())


def norm_warps(width: int) -> int:
    """Warps of a program that holds tokens of up to `width` channels, a power of two."""
    return min(MOST_WARPS, max(1, width // (32 * NORM_ELEMENTS)))


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    weight: GpuWeight,
    activation: GpuActivation,
    bias: Tensor | None,
    profile: Profile,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] of the norm of x [M, K], or of x + residual, and then the new residual; as `launch.linear`."""
    quantizer = NormQuantizer(activation, profile.pdl, profile.units)
    if not quantizer.fits or norm_weight.dtype != x.dtype:
        normed, new_residual = norm.normed(x, residual, norm_weight, epsilon)
        return launch.linear(normed, modality, weight, activation, bias, profile), new_residual
    codes, rows, new_residual = norm_quantize(x, residual, norm_weight, epsilon, modality, quantizer)
    return launch.multiply(codes, rows, weight, activation.gain, bias, x.dtype, profile), new_residual
