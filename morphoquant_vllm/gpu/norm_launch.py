"""RMSNorm and the quantizer after it in one launch, and the layer behind them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from morphoquant_vllm.gpu import launch
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.kernels.norm_quant import quantize_normed
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight, group_size_of
from morphoquant_vllm.gpu.tiles import splits_of
from morphoquant_vllm.numerics import norm

# The widest token that a program holds in registers. Wider ones are normed by torch.
WIDEST_NORM = 16384
# The widest of which the tables of both rows lie in registers, too.
WIDEST_EARLY = 4096
# Channels that each of its threads holds, if that takes no more than MOST_WARPS warps.
NORM_ELEMENTS = 8
MOST_WARPS = 16


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    activation: GpuActivation,
    pdl: bool = False,
    units: int = 1,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [M, K] and rows int32 [M] of the norm of x [M, K], or of x + residual, and then the new residual.

    `norm_weight` [K] has the dtype of x. `normed` [M, K]: where the norm's values go, too. `pdl` and `units` as in
    `launch.quantize`.
    """
    tokens, in_features = x.shape
    if in_features != activation.in_features or in_features > WIDEST_NORM:
        raise ValueError(f"the norm needs x as [M, {activation.in_features}] of {WIDEST_NORM} channels at most")
    if norm_weight.dtype != x.dtype or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"the norm's weight must be {x.dtype} [{in_features}]")
    x = _aligned(x)
    codes = torch.empty((tokens, in_features), dtype=torch.int8, device=x.device)
    rows = torch.empty((tokens,), dtype=torch.int32, device=x.device)
    new_residual = None
    if residual is not None:
        residual = _aligned(residual)
        new_residual = torch.empty((tokens, in_features), dtype=x.dtype, device=x.device)
    if tokens:
        each = triton.cdiv(tokens, launch.QUANTIZE_PROGRAMS * units)
        width = triton.next_power_of_2(in_features)
        # A pointer that is neither read nor written must still be one.
        second = x if residual is None else residual
        quantize_normed[(triton.cdiv(tokens, each),)](
            *(x, second, norm_weight, modality, activation.inverse, activation.centre, activation.limit),
            activation.massive_channel if activation.in_order else activation.channel_order,
            *(activation.massive_channel, activation.massive_low, activation.massive_high),
            *(codes, rows, x if new_residual is None else new_residual, x if normed is None else normed),
            *(epsilon, x.stride(0), second.stride(0), in_features, activation.gain.numel(), tokens, each),
            B=activation.massive_channel.shape[0],
            J=activation.massive_channel.shape[1],
            WIDTH=width,
            BLOCK_K=launch.gather_block(width),
            ADD=residual is not None,
            WRITE_NORMED=normed is not None,
            IN_ORDER=activation.in_order,
            EARLY=tokens < launch.WHOLE_TOKENS and width <= WIDEST_EARLY,
            PDL=pdl,
            num_warps=norm_warps(width),
            # Each operation must round, as in the reference.
            enable_fp_fusion=False,
        )
    return codes, rows, new_residual


def _aligned(x: Tensor) -> Tensor:
    """x [M, K], copied if its tokens do not begin on 16 bytes and multiples of 16 elements apart."""
    alignment = launch.IN_ORDER_ALIGNMENT
    if x.stride(1) == 1 and not x.stride(0) % alignment and not x.data_ptr() % alignment:
        return x
    return x.clone(memory_format=torch.contiguous_format)


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
    if x.shape[1] > WIDEST_NORM:
        if residual is None:
            normed = norm.rms_norm(x, norm_weight, epsilon)
        else:
            normed, residual = norm.add_rms_norm(x, residual, norm_weight, epsilon)
        return launch.linear(normed, modality, weight, activation, bias, profile), residual
    codes, rows, new_residual = norm_quantize(
        x, residual, norm_weight, epsilon, modality, activation, profile.pdl, profile.units
    )
    tile = profile.architecture.tile(x.shape[0], group_size_of(weight), weight.two_level)
    splits = splits_of(tile, max(1, x.shape[0]), weight.absorbed_bias.shape[1], weight.codes.shape[1], profile.units)
    settings = (tile, splits, profile.inline_assembly, profile.pdl)
    return launch.matmul(codes, rows, weight, activation.gain, bias, x.dtype, *settings), new_residual


def warm(activation: GpuActivation, dtype: torch.dtype, profile: Profile) -> None:
    """Compile, by running it, the kernel for few tokens and many, with and without a residual.

    The rest of the layer is `launch.warm`'s.
    """
    if activation.in_features > WIDEST_NORM:
        return
    device = activation.gain.device
    for tokens in (1, launch.WHOLE_TOKENS):
        x = torch.zeros((tokens, activation.in_features), dtype=dtype, device=device)
        modality = torch.zeros(tokens, dtype=torch.int32, device=device)
        for residual in (None, x):
            norm_quantize(x, residual, x[0], 1e-6, modality, activation, profile.pdl, profile.units)
