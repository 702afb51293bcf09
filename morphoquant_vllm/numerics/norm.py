"""RMSNorm as vLLM's intermediate representation defines it, for quantizers that also compute the norm.

    h = x + residual                                    float32; without a residual h = x
    y = (h / sqrt(mean_k h^2 + epsilon)) * weight       rounded to 16 bit after the division and after the product

The new residual is h rounded to 16 bit. vLLM's other implementations may round less or more often. torch's compiler
omits the middle rounding, and the CUDA kernel rounds h before it squares it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y [M, K] of x [M, K] and weight [K]; y has the dtype of x."""
    return _normed(x.float(), weight, epsilon).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y and the new residual, both [M, K] in the dtype of x, from x and residual [M, K] and weight [K]."""
    h = x.float() + residual.float()
    return _normed(h, weight, epsilon).to(x.dtype), h.to(x.dtype)


def _normed(h: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    variance = h.pow(2).mean(dim=-1, keepdim=True)
    return (h * torch.rsqrt(variance + epsilon)).to(weight.dtype) * weight


def normed(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor | None]:
    """`add_rms_norm`, or `rms_norm` and None without a residual."""
    if residual is None:
        return rms_norm(x, weight, epsilon), None
    return add_rms_norm(x, residual, weight, epsilon)
