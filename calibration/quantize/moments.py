"""Means and second moments of one input's codes and 16-bit values, on which the rounding of weights rests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.processes import Processes
from calibration.quantize.int8_products import products

# The fields that are sums over tokens, and so over chunks and processes.
SUMS = ("weight", "square_weight", "code_sum", "value_sum", "code_code", "code_aim")
# Tokens whose codes are multiplied with each other at once, and channels of the products: bounds their memory.
CODE_TOKENS = 4096
CODE_CHANNELS = 1024
TINY = torch.finfo(torch.float32).tiny


def _of_outputs(matrix: Tensor) -> bool:
    """Whether codes times outputs take less work than codes times values, for a weight [N, K]."""
    return 2 * matrix.shape[0] <= matrix.shape[1]


@dataclass
class Moments:
    """Weighted sums over tokens, float32; K in any one order. A set of tokens has a separate bias."""

    weight: Tensor  # [sets]
    # Of the squared weights of all tokens.
    square_weight: Tensor  # []
    code_sum: Tensor  # [sets, K]
    value_sum: Tensor  # [sets, K]
    code_code: Tensor  # [K, K]
    # Sum of codes times 16-bit values [K, K], or times the 16-bit layer's outputs [K, N]; the cheaper one.
    code_aim: Tensor
    # The 16-bit layer's weights [N, K].
    matrix: Tensor

    @staticmethod
    def zeros(sets: int, matrix: Tensor) -> Moments:
        """Empty sums for the input of the 16-bit weights `matrix` [N, K]."""
        out_features, in_features = matrix.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=matrix.device)

        # For T tokens: T K^2 products and then N K^2, or 2 T N K.
        aims = out_features if _of_outputs(matrix) else in_features
        squares = zeros(in_features, in_features), zeros(in_features, aims)
        return Moments(zeros(sets), zeros(), zeros(sets, in_features), zeros(sets, in_features), *squares, matrix)

    @property
    def tokens(self) -> float:
        """As many tokens of equal weight tell as much as these (Kish's effective sample size); at least 1."""
        return max(1.0, float(self.weight.sum().square() / self.square_weight.clamp(min=TINY)))

    @property
    def of_outputs(self) -> bool:
        """Whether code_aim has codes times outputs."""
        return _of_outputs(self.matrix)

    def add(self, codes: Tensor, gain: Tensor, values: Tensor, token_set: Tensor, weight: Tensor) -> None:
        """Add tokens: codes int8 and 16-bit values float32 [tokens, K]; gain, set int64 and weight of each [tokens]."""
        scaled = codes.float() * gain[:, None]
        selector = torch.nn.functional.one_hot(token_set, self.weight.numel()).float().T * weight
        self.weight += selector.sum(1)
        self.square_weight += weight.square().sum()
        self.code_sum += selector @ scaled
        self.value_sum += selector @ values
        aims = values @ self.matrix.T if self.of_outputs else values
        self.code_aim.addmm_((scaled * weight[:, None]).T, aims)

    def add_codes(self, codes: Tensor, factor: Tensor) -> None:
        """Add products of codes int8 [tokens, K] with each other; factor [tokens]: weight times squared gain.

        Tokens of equal factor are summed as integers. Only the upper triangle is computed.
        """
        for value in factor.unique():
            for which in (factor == value).nonzero().flatten().split(CODE_TOKENS):
                own = codes[which]
                for start in range(0, own.shape[1], CODE_CHANNELS):
                    channels = slice(start, start + CODE_CHANNELS)
                    self.code_code[channels, start:] += value * products(own[:, channels], own[:, start:])

    def mirror(self) -> None:
        """Complete code_code: copy its upper triangle to the lower one."""
        for start in range(0, self.code_code.shape[0], CODE_CHANNELS):
            end = start + CODE_CHANNELS
            self.code_code[end:, start:end] = self.code_code[start:end, end:].T

    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        for field in SUMS:
            setattr(self, field, processes.all_reduce(getattr(self, field), "SUM"))

    def add_means(self, other: Moments) -> None:
        """Let `means` be those of the tokens of `other`, too; second moments stay as they are."""
        for name in ("weight", "code_sum", "value_sum"):
            getattr(self, name).add_(getattr(other, name))

    def mix(self, pooled: Moments, share: float) -> None:
        """Let these moments weigh `share` of the whole, and `pooled` ones of the same codes the rest.

        `pooled` has codes times values. Means and moments are then those of all these tokens together.
        """
        own = share / float(self.weight.sum()) if share > 0 else 0.0
        rest = (1 - share) / float(pooled.weight.sum())
        for name in SUMS:
            other = getattr(pooled, name)
            if name == "code_aim" and self.of_outputs:
                other = other @ self.matrix.T
            power = 2 if name == "square_weight" else 1
            getattr(self, name).mul_(own**power).add_(other, alpha=rest**power)

    def take_centred(self, channels: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Codes times codes [K, K], and times the outputs of these channels [K, n], about the means of each set.

        These are the moments that remain after a bias per set. They reuse the memory of code_code and code_aim, which
        are empty afterwards.
        """
        scaled = self.code_sum / self._divisor()
        code_code, code_aim, matrix = self.code_code, self.code_aim, self.matrix[channels]
        self.forget_squares()
        code_code -= scaled.T @ self.code_sum
        if self.of_outputs:
            return code_code, code_aim[:, channels].sub_(scaled.T @ (self.value_sum @ matrix.T))
        code_aim -= scaled.T @ self.value_sum
        return code_code, code_aim @ matrix.T

    def forget_squares(self) -> None:
        """Free the second moments; means remain."""
        self.code_code = self.code_aim = self.code_sum.new_empty(0)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean code and mean value of each set, [sets, K] each; 0 for a set without tokens."""
        return self.code_sum / self._divisor(), self.value_sum / self._divisor()

    def _divisor(self) -> Tensor:
        return self.weight.clamp(min=TINY)[:, None]


def gather(
    parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], codes: Tensor, factor: Tensor, moments: Moments
) -> Moments:
    """`moments` with the chunks `parts` (see `Moments.add`) and all their codes and factors (see `add_codes`)."""
    for part in parts:
        moments.add(*part)
    moments.add_codes(codes, factor)
    moments.mirror()
    return moments


def fitting_shrinkage(strength: float, channels: int, tokens: float) -> float:
    """The shrinkage of a regression on `channels` channels and this many tokens: strength * channels / tokens.

    An estimate is noisier with more unknowns and with fewer tokens. The best ridge grows in the same ratio if the codes
    explain the same part of the error. So one `strength` suits every input.
    """
    return strength * channels / tokens


def regress(code_code: Tensor, code_output: Tensor, absorbed: Tensor, shrinkage: float) -> Tensor:
    """Weights for the codes, float32 [N, K], whose outputs come nearest to the 16-bit layer's.

    code_code [K, K] and code_output [K, N] are those of `Moments.take_centred`; the latter is overwritten.

    The result is the least-squares fit of W x to the codes. `shrinkage` x the mean energy of a channel draws it to
    `absorbed` = W * step, the right weights for codes without error. So the weights compensate for the rounding of
    activations and for the errors of earlier layers, as far as the codes show them. Too weak a pull would fit the
    errors of these very tokens, which no other tokens share: see `fitting_shrinkage`.
    """
    ridge = shrinkage * code_code.diagonal().mean()
    if not float(ridge) >= TINY:
        # The input was the same, or zero, for all tokens: nothing can be told from its codes.
        return absorbed
    damped = code_code.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) and bool(damped.isfinite().all()):
        # The codes are constant, except for the rounding of sums, so there is nothing to fit.
        return absorbed
    right = code_output.add_(ridge * absorbed.T)
    return torch.cholesky_solve(right, factor).T


def output_bias(code_mean: Tensor, value_mean: Tensor, weight: Tensor, served: Tensor, blocks: int) -> Tensor:
    """The bias of each set that makes its mean output that of the 16-bit layer, float32 [blocks, sets, N].

    code_mean, value_mean [sets, K] as from `Moments.means`. weight [N, K] is the 16-bit layer's; served [N, K]
    multiplies the codes. The bias is split over `blocks` blocks of K.
    """

    def product(mean: Tensor, matrix: Tensor) -> Tensor:
        left, right = mean.double().unflatten(1, (blocks, -1)), matrix.double().unflatten(1, (blocks, -1))
        return torch.einsum("sbk,nbk->bsn", left, right)

    return (product(value_mean, weight) - product(code_mean, served)).float()
