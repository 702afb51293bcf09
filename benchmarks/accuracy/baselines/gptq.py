"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): int4 rounding in which later columns compensate for earlier ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.accuracy.baselines.weights import check_groups, clip_scale, nearest

# Fraction of the mean diagonal that is added to it: GPTQModel's default. The authors' code has 0.01.
DAMPING = 0.05
# Columns whose errors are applied at once to the later columns.
COLUMN_BLOCK = 128


def hessian_of(inputs: Iterable[Tensor]) -> Tensor:
    """Mean of x x^T over all tokens of the inputs [M, K]: float32 [K, K]."""
    total, tokens = None, 0
    for x in inputs:
        product = x.float().T @ x.float()
        total = product if total is None else total.add_(product)
        tokens += x.shape[0]
    if total is None:
        raise ValueError("a Hessian needs at least one input")
    return total / tokens


def hessian_loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """The loss that GPTQ minimises: the mean squared error of the output, summed over output channels."""
    error = (rounded - weight).double()
    return float((error @ hessian.double() * error).sum())


def group_order(diagonal: Tensor, group_size: int) -> Tensor:
    """The order of columns by a Hessian's diagonal [K], int64 [K]: groups by falling maximum, columns within each too.

    GPTQModel's default ("act_group_aware"): columns that matter are rounded first, and groups stay whole.
    """
    groups = diagonal.unflatten(0, (-1, group_size))
    within = groups.argsort(dim=1, descending=True, stable=True)
    between = groups.amax(dim=1).argsort(descending=True, stable=True)
    return (within + torch.arange(groups.shape[0])[:, None] * group_size)[between].flatten()


def gptq_int4(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """Symmetric int4 of `weight` [N, K] against `hessian` [K, K], groups in natural channel order; float32 [N, K].

    Columns are rounded in the order of `group_order`. A group's scales are searched at its turn, on the weights as
    compensated so far.
    """
    check_groups(weight, group_size)
    weight, hessian = weight.float().clone(), hessian.float().clone()
    columns, order = weight.shape[1], group_order(hessian.diagonal(), group_size)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    # The rounding error of a channel that is always 0 must not change other columns.
    weight[:, dead] = 0.0
    weight, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rounded = torch.zeros_like(weight)
    scale = torch.ones(weight.shape[0])
    # A block ends at the end of a group. So a group's weights are up to date when its scales are searched.
    width = max(group_size, COLUMN_BLOCK // group_size * group_size)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block, errors = weight[:, start:end], torch.zeros(weight.shape[0], end - start)
        for column in range(end - start):
            position = start + column
            if position % group_size == 0:
                scale = clip_scale(block[:, None, column : column + group_size])[:, 0]
            rounded[:, position] = nearest(block[:, column], scale)
            errors[:, column] = (block[:, column] - rounded[:, position]) / upper[position, position]
            block[:, column + 1 :] -= errors[:, column, None] * upper[position, position + 1 : end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return rounded[:, order.argsort()]
