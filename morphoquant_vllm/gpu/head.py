"""lm_head in 8 bits on a GPU: its launch, and the check of its kernel against the torch reference.

M tokens, K channels, N outputs. vLLM computes logits outside of CUDA graphs, once a step, so the launch goes through
Triton's JIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import device
from morphoquant_vllm.numerics import head as numerics

if TYPE_CHECKING:
    from morphoquant_vllm.gpu.launcher import Launch

# Rows of codes start at multiples of this many bytes, so that copies of 16 bytes can read them.
CHANNEL_MULTIPLE = 16
DTYPES = (torch.bfloat16, torch.float16)
# Outputs that the check compares; the reference computes them on the host.
CHECKED_OUTPUTS = 256


@dataclass(frozen=True)
class HeadTile:
    """Sizes of one program. They were chosen by what they compile to; no GPU has timed them."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int


# For up to block_m tokens the first tile that fits, for more the last.
TILES = (HeadTile(64, 16, 128, 4, 5), HeadTile(64, 64, 64, 4, 4))


def tile_of(tokens: int) -> HeadTile:
    """The tile for a number of tokens."""
    return next((tile for tile in TILES if tokens <= tile.block_m), TILES[-1])


def eight_bit_refusal(weight: Tensor) -> str | None:
    """The reason why `head` cannot use codes of a weight [N, K]; None if it can."""
    if weight.dtype not in DTYPES:
        return f"the GPU's 8-bit head takes bfloat16 and float16, not {str(weight.dtype).removeprefix('torch.')}"
    if weight.shape[1] % CHANNEL_MULTIPLE:
        return f"K = {weight.shape[1]} is not a multiple of {CHANNEL_MULTIPLE}"
    return None


def launch_of(x: Tensor, codes: Tensor, scale: Tensor, y: Tensor) -> Launch:
    """The launch that writes y [M, N], contiguous."""
    from morphoquant_vllm.gpu.kernels.eight_bit_head import eight_bit_head
    from morphoquant_vllm.gpu.launcher import Launch

    tokens, outputs = y.shape
    tile = tile_of(tokens)
    arguments = {
        "x_ptr": x,
        "out_ptr": y,
        "M": tokens,
        "codes_ptr": codes,
        "scale_ptr": scale,
        "N": outputs,
        "K": codes.shape[1],
        **constants(tile, codes.shape[1]),
        "FLOAT32": not codes.is_cuda,
    }
    grid = (-(-tokens // tile.block_m), -(-outputs // tile.block_n))
    return Launch(eight_bit_head, grid, arguments, {"num_warps": tile.warps, "enable_fp_fusion": False})


def constants(tile: HeadTile, channels: int) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "EVEN_K": channels % tile.block_k == 0,
    }


def head(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """y [M, N] in the dtype of x [M, K] from codes int8 [N, K] and scale float32 [N], as numerics.head.head.

    Raises ValueError for wrong dtypes, shapes or layouts.
    """
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be bfloat16 or float16 [M, K], got {x.dtype} {list(x.shape)}")
    tokens, channels = x.shape
    if codes.dtype is not torch.int8 or codes.dim() != 2 or codes.shape[1] != channels or channels % CHANNEL_MULTIPLE:
        raise ValueError(f"codes must be int8 [N, {channels}], K a multiple of 16; got {codes.dtype} {codes.shape}")
    if scale.dtype is not torch.float32 or scale.shape != codes.shape[:1]:
        raise ValueError(f"scale must be float32 [{codes.shape[0]}], got {scale.dtype} {list(scale.shape)}")
    if not (codes.is_contiguous() and scale.is_contiguous()):
        raise ValueError("codes and scale must be contiguous")
    y = x.new_empty((tokens, codes.shape[0]))
    if y.numel():
        launch_of(x.contiguous(), codes, scale, y).run()
    return y


def check(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Compile the kernels for a head and compare their logits with the torch reference.

    Raises MorphoQuantError if the device is not served, or if a logit lies outside of the documented bound.
    """
    if codes.is_cuda:
        device.profile_of(codes.device)
    generator = torch.Generator().manual_seed(codes.shape[1])
    weight, factors = codes[:CHECKED_OUTPUTS].cpu(), scale[:CHECKED_OUTPUTS].cpu()
    for tile in TILES:
        x = torch.randn((tile.block_m - 1, codes.shape[1]), generator=generator).to(dtype)
        y = head(x.to(codes.device), codes, scale)[:, :CHECKED_OUTPUTS].cpu()
        expected = numerics.head(x, weight, factors)
        allowed = numerics.output_bound(x, weight, factors, expected)
        if not bool(((y.double() - expected.double()).abs() <= allowed).all()):
            raise MorphoQuantError(
                f"lm_head: the 8-bit head of {tile.block_m} tokens is wrong on this GPU; serve with the 16-bit head, "
                "and report it with the versions of GPU, driver and Triton"
            )
