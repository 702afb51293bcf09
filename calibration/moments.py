"""Means and second moments of one input's codes and 16-bit values: what rounding the weights needs to know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.processes import Processes

# How each field merges over chunks and over processes alike (the names are those of torch.distributed.ReduceOp).
REDUCTIONS = {"weight": "SUM", "code_sum": "SUM", "value_sum": "SUM", "code_code": "SUM", "code_value": "SUM"}


@dataclass
class Moments:
    """Weighted sums over tokens, float32; K in any one order, S sets of tokens with a bias of their own."""

    weight: Tensor  # [S]
    code_sum: Tensor  # [S, K]
    value_sum: Tensor  # [S, K]
    code_code: Tensor  # [K, K]
    code_value: Tensor  # [K, K]

    @staticmethod
    def zeros(sets: int, in_features: int, device: torch.device) -> Moments:
        """Nothing seen yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        square = (in_features, in_features)
        return Moments(zeros(sets), zeros(sets, in_features), zeros(sets, in_features), zeros(*square), zeros(*square))

    def add(self, codes: Tensor, values: Tensor, token_set: Tensor, weight: Tensor) -> None:
        """Take in tokens: codes and 16-bit values float32 [T, K], the set of each int64 [T], its weight [T]."""
        selector = torch.nn.functional.one_hot(token_set, self.weight.numel()).float().T * weight
        self.weight += selector.sum(1)
        self.code_sum += selector @ codes
        self.value_sum += selector @ values
        weighted = codes * weight[:, None]
        self.code_code.addmm_(weighted.T, codes)
        self.code_value.addmm_(weighted.T, values)

    def reduce(self, processes: Processes) -> None:
        """Take in what the other processes have seen, too."""
        for field, operation in REDUCTIONS.items():
            setattr(self, field, processes.reduce(getattr(self, field), operation))

    def centred(self) -> tuple[Tensor, Tensor]:
        """code_code and code_value about each set's own means, [K, K]: what a bias per set leaves to do."""
        share = self.weight.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        scaled = self.code_sum / share
        return self.code_code - scaled.T @ self.code_sum, self.code_value - scaled.T @ self.value_sum

    def take_centred(self) -> tuple[Tensor, Tensor]:
        """As `centred`, in the memory of code_code and code_value, which are then gone: each is [K, K]."""
        share = self.weight.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        scaled = self.code_sum / share
        found = self.code_code, self.code_value
        for square, sums in zip(found, (self.code_sum, self.value_sum), strict=True):
            square -= scaled.T @ sums
        self.code_code = self.code_value = scaled.new_empty(0)
        return found

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean code and mean value of each set, [S, K] each; 0 for a set without tokens."""
        share = self.weight.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return self.code_sum / share, self.value_sum / share


def gather(
    parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], sets: int, in_features: int, device: torch.device
) -> Moments:
    """Moments of chunks (codes, values, token_set, weight), as `Moments.add` takes them."""
    moments = Moments.zeros(sets, in_features, device)
    for codes, values, token_set, weight in parts:
        moments.add(codes, values, token_set, weight)
    return moments


def regress(centred: tuple[Tensor, Tensor], weight: Tensor, absorbed: Tensor, shrinkage: float) -> Tensor:
    """Weights for the codes, float32 [N, K], whose outputs come nearest to the 16-bit layer's, from `Moments.centred`.

    Least squares of W x on the codes, drawn towards `absorbed` = W * step (what would be right if codes had no error)
    by `shrinkage` x the mean energy of a channel. weight [N, K] is the 16-bit layer's. So the weights make up for what
    the rounding of activations and the layers before lost, as far as it can be told from the codes.
    """
    code_code, code_value = centred
    ridge = shrinkage * code_code.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = code_code.clone()
    damped.diagonal().add_(ridge)
    right = code_value @ weight.T + ridge * absorbed.T
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped)).T


def output_bias(code_mean: Tensor, value_mean: Tensor, weight: Tensor, served: Tensor, blocks: int) -> Tensor:
    """The bias of each set that makes its mean output that of the 16-bit layer, float32 [B, S, N].

    code_mean, value_mean [S, K] as from `Moments.means`. weight [N, K] is the 16-bit layer's, served [N, K] what the
    codes are multiplied by; split over B blocks of K.
    """

    def product(mean: Tensor, matrix: Tensor) -> Tensor:
        left, right = mean.double().unflatten(1, (blocks, -1)), matrix.double().unflatten(1, (blocks, -1))
        return torch.einsum("sbk,nbk->bsn", left, right)

    return (product(value_mean, weight) - product(code_mean, served)).float()
