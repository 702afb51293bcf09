"""A small layer whose inputs are correlated, and the loss of its output."""

import torch
from torch import Tensor

K, N = 256, 20
# A moderate damping, for tests of something else.
DAMPING = 0.05


def correlated_hessian(seed: int = 0, tokens: int = 1000) -> Tensor:
    """Second moments [K, K] of integer codes that share a few directions, as those of a layer's input do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, K, generator=generator)
    codes = (shared * 0.5 + torch.randn(tokens, K, generator=generator)) * torch.rand(K, generator=generator) * 2
    codes = codes.round().clamp(-8, 7)
    return codes.T @ codes / tokens


def fitted_weights(seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def loss(hessian: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    """The output's square error, summed over outputs."""
    served = codes.double().unflatten(1, (scale.shape[1], -1)) * scale.double()[..., None]
    gap = served.flatten(1) - weight.double()
    return float(((gap @ hessian.double()) * gap).sum())
