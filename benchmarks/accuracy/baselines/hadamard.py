"""Hadamard matrices of the sizes that language models have, and the random rotation made of one (QuaRot)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(order: int) -> Tensor | None:
    """A matrix of +-1 with orthogonal lines, float32 [order, order]; None if these constructions give none.

    They are Sylvester's doubling, Paley's two constructions for prime fields, and Kronecker products of these. Examples
    are 576 = 16 * 36, 1536 = 128 * 12, 896 = 32 * 28 and 4864 = 64 * 76.
    """
    if order == 1:
        return torch.ones(1, 1)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if order % 4:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), half)
    if _is_prime(order - 1):
        return _paley_first(order - 1)
    if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_second(order // 2 - 1)
    for factor in range(4, math.isqrt(order) + 1, 4):
        if order % factor == 0:
            left, right = hadamard(factor), hadamard(order // factor)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def rotation_block(in_features: int) -> int:
    """Width of the diagonal blocks of the rotation: K if a Hadamard matrix of order K is known, else K's largest
    power of two."""
    return in_features if hadamard(in_features) is not None else in_features & -in_features


def rotation(in_features: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [K, K]: signs drawn from `seed`, then Hadamard blocks divided by sqrt(width).

    The product of x @ rotation and W @ rotation is that of x and W.
    """
    width = rotation_block(in_features)
    block = hadamard(width)
    assert block is not None
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (in_features,), generator=generator) * 2.0 - 1.0
    matrix = torch.block_diag(*[block / math.sqrt(width)] * (in_features // width))
    return signs[:, None] * matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """Quadratic characters of all differences, [prime, prime]."""
    character = torch.full((prime,), -1.0)
    character[[value * value % prime for value in range(1, prime)]] = 1.0
    character[0] = 0.0
    index = torch.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def _bordered(prime: int, sign: float) -> Tensor:
    """Conference matrix of order prime + 1; symmetric for sign = 1, skew for sign = -1."""
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = sign
    matrix[1:, 1:] = _jacobsthal(prime)
    return matrix


def _paley_first(prime: int) -> Tensor:
    return torch.eye(prime + 1) + _bordered(prime, -1.0)


def _paley_second(prime: int) -> Tensor:
    conference, identity = _bordered(prime, 1.0), torch.eye(prime + 1)
    pattern = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.kron(conference, pattern) + torch.kron(identity, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
