"""Codes and scales of the groups of a layer, each group's scale chosen by the loss of its codes. Pure.

`compensate` takes the groups one after the other, as GPTQ takes columns (arXiv 2210.17323): later groups compensate for
the rounding error of earlier ones. `improve` searches each group again with the others fixed. In a group, columns are
rounded in turn, once for each candidate scale, and the scale whose codes lose least wins. The best scale for weights
that are rounded separately is not the best one for codes that compensate for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calibration.quantize.allowed_scales import AllowedScales
from morphoquant_vllm.numerics import weights

# Columns whose changes are applied to the later columns at once. Within them the beam search keeps several choices.
BLOCK_COLUMNS = 1024
# Columns of a block whose changes are applied to the block's later columns at once. They are few enough that the
# columns which every group changes stay in the cache. They are many enough for fast products.
RUN_COLUMNS = 128
# Choices of codes and scales of an output channel that are kept from one group of a block to the next.
BEAM = 4
# Output channels whose groups are searched at once, and those whose groups are improved at once. The latter have fewer
# candidates, and no beam. More would be faster, and set the peak of memory.
SEARCH_OUTPUTS, IMPROVE_OUTPUTS = 512, 2048
# Factor by which the damping grows if a factorisation fails for lack of digits.
MORE_DAMPING = 10.0


@dataclass(frozen=True)
class _Choice:
    """The kept choices for some groups: codes and errors [columns, beam, n], scales [groups, beam, n].

    parent [beam, n] is the kept choice of the groups before from which each comes.
    """

    codes: Tensor
    errors: Tensor
    scale: Tensor
    parent: Tensor


class Ordered(NamedTuple):
    """The order in which `compensate` takes groups and columns, and the factor of the inverse Hessian in it."""

    groups: Tensor  # int64 [K/G]
    columns: Tensor  # int64 [K]
    upper: Tensor  # float32 [K, K]


def ordered(damped: Tensor, group_size: int) -> Ordered:
    """Groups by falling energy, and the columns in a group, too; damped [K, K] is the Hessian.

    So the columns that matter most are rounded while most other columns are left to compensate for them.
    """
    energy = damped.diagonal().view(-1, group_size)
    groups = energy.sum(1).argsort(descending=True, stable=True)
    inner = energy.argsort(dim=1, descending=True, stable=True)[groups]
    columns = (groups[:, None] * group_size + inner).flatten()
    return Ordered(groups, columns, inverse_factor(damped[columns][:, columns]))


def compensate(
    fitted: Tensor, damped: Tensor, group_size: int, allowed: AllowedScales, taken: Ordered | None = None
) -> tuple[Tensor, Tensor]:
    """Codes as floats [N, K] and scale float32 [N, K/G] of `fitted` [N, K]; damped [K, K] is the Hessian.

    `taken`: as from `ordered`, which is called if it is None.
    """
    group_order, order, upper = taken or ordered(damped, group_size)
    energy = damped.diagonal()[order].view(-1, group_size)
    # Transposed, a column of the weights is contiguous: one column is processed at a time.
    remaining = fitted.T[order].contiguous()
    scale = torch.empty(energy.shape[0], fitted.shape[0], device=fitted.device)
    groups = max(1, BLOCK_COLUMNS // group_size)
    for first in range(0, scale.shape[0], groups):
        span = slice(first, first + groups)
        start, end = first * group_size, min((first + groups) * group_size, remaining.shape[0])
        block, factor = remaining[start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for output in range(0, fitted.shape[0], SEARCH_OUTPUTS):
            outputs = slice(output, output + SEARCH_OUTPUTS)
            found = _search_block(block[:, outputs], factor, energy[span], allowed.of_outputs(outputs))
            block[:, outputs], errors[:, outputs], scale[span, outputs] = found
        remaining[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    codes, natural = torch.empty_like(remaining), torch.empty_like(scale)
    codes[order], natural[group_order] = remaining, scale
    return codes.T.contiguous(), natural.T.contiguous()


def _search_block(
    block: Tensor, factor: Tensor, energy: Tensor, allowed: AllowedScales
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and errors [columns, n] and scales [groups, n] of a block of groups, by a beam search over them.

    block [columns, n]: the weights with the earlier columns' compensation. factor [columns, columns]: the factor of the
    inverse Hessian. energy [groups, G]: the Hessian's diagonal.
    """
    rest, loss = block[:, None], block.new_zeros(1, block.shape[1])
    runs: list[_Choice] = []
    for part in energy.split(max(1, RUN_COLUMNS // energy.shape[1])):
        end = block.shape[0] - rest.shape[0] + part.numel()
        start = end - part.numel()
        run, loss = _search_run(rest[: part.numel()], factor[start:end, start:end], part, loss, allowed)
        runs.append(run)
        rest = _compensated(rest[part.numel() :], factor[start:end, end:], run)
    best = _trace_back(runs, torch.zeros_like(loss[:1], dtype=torch.int64))
    return best.codes[:, 0], best.errors[:, 0], best.scale[:, 0]


def _search_run(
    rest: Tensor, factor: Tensor, energy: Tensor, loss: Tensor, allowed: AllowedScales
) -> tuple[_Choice, Tensor]:
    """The choices kept after a run of groups, and their losses [beam, n], from `loss` [beam, n] of those before it.

    rest [columns, beam, n] are the run's weights for each of these; factor and energy as in `_search_block`.
    """
    group_size, n = energy.shape[1], rest.shape[2]
    choices: list[_Choice] = []
    for group, importance in enumerate(energy):
        start, end = group * group_size, (group + 1) * group_size
        # Only the weights of the best choice, since those of the others differ little. Transposed, not copied: an
        # output is then a place in a vector.
        suited = weights.group_scales(rest[:group_size, 0].T[:, None], importance[None])
        candidates = allowed.candidates(suited[:, 0].float().expand(rest.shape[1], n), far=True)
        codes, errors = round_group(rest[:group_size], factor[start:end, start:end], candidates)
        choice, loss = _keep_best(codes, errors, candidates, loss)
        choices.append(choice)
        rest = _compensated(rest[group_size:], factor[start:end, end:], choice)
    each = torch.arange(loss.shape[0], device=loss.device)[:, None].expand_as(loss)
    return _trace_back(choices, each), loss


def _compensated(rest: Tensor, factor: Tensor, choice: _Choice) -> Tensor:
    """Later weights [columns, beam, n] after `choice`, from `rest` [columns, beam before it, n].

    factor [columns of the choice, columns].
    """
    later = rest.gather(1, choice.parent.expand(rest.shape[0], -1, -1)).flatten(1)
    return later.addmm_(factor.T, choice.errors.flatten(1), alpha=-1).unflatten(1, choice.parent.shape)


def _keep_best(codes: Tensor, errors: Tensor, candidates: Tensor, loss: Tensor) -> tuple[_Choice, Tensor]:
    """The BEAM best of all candidates of all choices so far, best first, and their losses [beam, n].

    codes and errors are [G, candidates, beam, n], candidates [candidates, beam, n], loss [beam, n].
    """
    total = errors.square().sum(0) + loss
    # Equal candidates are kept once: copies would displace other choices.
    total[1:].masked_fill_(candidates[1:] == candidates[:-1], float("inf"))
    kept, index = total.flatten(0, 1).topk(min(BEAM, total[:, :, 0].numel()), dim=0, largest=False)
    each = index.expand(codes.shape[0], -1, -1)
    choice = _Choice(
        codes.flatten(1, 2).gather(1, each),
        errors.flatten(1, 2).gather(1, each),
        candidates.flatten(0, 1).gather(0, index)[None],
        index % loss.shape[0],
    )
    return choice, kept


def _trace_back(choices: list[_Choice], at: Tensor) -> _Choice:
    """The choices of several groups as one: those that led to the choices `at` [kept, n] of the last group."""
    found: list[tuple[Tensor, ...]] = []
    for choice in reversed(choices):
        parts = (choice.codes, choice.errors, choice.scale)
        found.append(tuple(part.gather(1, at.expand(part.shape[0], -1, -1)) for part in parts))
        at = choice.parent.gather(0, at)
    codes, errors, scale = (torch.cat(parts[::-1]) for parts in zip(*found, strict=True))
    return _Choice(codes, errors, scale, at)


def round_group(weight: Tensor, factor: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and errors [G, candidates, ...] of weights [G, ...] for each candidate scale [candidates, ...].

    The later columns compensate for each column's error. factor [G, G]: the upper factor of the inverse Hessian. The
    sum of the squared errors is the loss.
    """
    rest = weight[:, None].expand(-1, *candidates.shape).flatten(1).contiguous()
    step = candidates.flatten()
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    # In place: each column's values stay in the cache.
    for column, (code, error, own) in enumerate(zip(codes, errors, factor.diagonal().tolist(), strict=True)):
        weights.round_int4(rest[column], step, out=code)
        torch.addcmul(rest[column], code, step, value=-1, out=error).div_(own)
        rest[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return codes.unflatten(1, candidates.shape), errors.unflatten(1, candidates.shape)


def improve(
    fitted: Tensor, damped: Tensor, codes: Tensor, scale: Tensor, allowed: AllowedScales
) -> tuple[Tensor, Tensor]:
    """Codes as floats [N, K] and scale [N, K/G] of less loss: each group in turn, with the others fixed."""
    groups = scale.shape[1]
    group_size = codes.shape[1] // groups
    codes, scale = codes.T.contiguous(), scale.T.contiguous()
    gradient = damped @ (fitted.T - codes * scale.repeat_interleave(group_size, 0))
    together = max(1, BLOCK_COLUMNS // group_size)
    for first in range(0, groups, together):
        span = slice(first, first + together)
        columns = slice(first * group_size, min(first + together, groups) * group_size)
        local = damped[columns, columns]
        factors = [_ordered_factor(part) for part in _diagonal_blocks(local, group_size)]
        changes = torch.empty_like(gradient[columns])
        for output in range(0, fitted.shape[0], IMPROVE_OUTPUTS):
            outputs = slice(output, output + IMPROVE_OUTPUTS)
            changes[:, outputs] = _improve_block(
                gradient[columns, outputs],
                local,
                factors,
                codes[columns, outputs],
                scale[span, outputs],
                allowed.of_outputs(outputs),
            )
        gradient[columns.stop :].addmm_(damped[columns, columns.stop :].T, changes, alpha=-1)
    return codes.T.contiguous(), scale.T.contiguous()


def _diagonal_blocks(matrix: Tensor, size: int) -> list[Tensor]:
    return [matrix[start : start + size, start : start + size] for start in range(0, matrix.shape[0], size)]


def _ordered_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a group by falling energy, and the factor of the inverse Hessian in that order."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return order, inverse_factor(hessian[order][:, order])


def _improve_block(
    gradient: Tensor,
    local: Tensor,
    factors: list[tuple[Tensor, Tensor]],
    codes: Tensor,
    scale: Tensor,
    allowed: AllowedScales,
) -> Tensor:
    """Improve the groups of a block in place; returns the change of its weights [columns, n].

    gradient [columns, n]: fitted less served weights, times the Hessian. local [columns, columns]: the Hessian of the
    block.
    """
    gradient, changes = gradient.clone(), torch.empty_like(gradient)
    size = codes.shape[0] // scale.shape[0]
    run = max(1, RUN_COLUMNS // size) * size
    for start in range(0, codes.shape[0], run):
        end = min(start + run, codes.shape[0])
        for group in range(start // size, end // size):
            span = slice(group * size, (group + 1) * size)
            changes[span] = _improve_group(gradient[span], *factors[group], codes[span], scale[group], allowed)
            gradient[span.stop : end].addmm_(local[span, span.stop : end].T, changes[span], alpha=-1)
        gradient[end:].addmm_(local[start:end, end:].T, changes[start:end], alpha=-1)
    return changes


def _improve_group(
    gradient: Tensor, order: Tensor, factor: Tensor, codes: Tensor, scale: Tensor, allowed: AllowedScales
) -> Tensor:
    """Improve one group's codes [G, n] and scale [n] in place; returns the change of its weights [G, n].

    order and factor as from `_ordered_factor`.
    """
    before, slope = codes[order] * scale, gradient[order]
    # The change of the weights that would give the least loss without rounding.
    way = factor.T @ (factor @ slope)
    candidates = allowed.candidates(scale, far=False)
    found, errors = round_group(before + way, factor, candidates)
    loss, best = errors.square().sum(0).min(0)
    # The right side is the loss without any change.
    better = loss < (slope * way).sum(0)
    scale.copy_(torch.where(better, candidates.gather(0, best[None])[0], scale))
    rounded = found.gather(1, best.expand(found.shape[0], 1, -1))[:, 0]
    codes[order] = torch.where(better, rounded, codes[order])
    changes = torch.empty_like(before)
    changes[order] = codes[order] * scale - before
    return changes


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = hessian^-1, float32 [K, K]; with more damping if float32 has too few digits."""
    more = MORE_DAMPING * torch.finfo(torch.float32).eps * hessian.diagonal().mean()
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            # Frees memory: each of these matrices is [K, K].
            del factor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
        hessian = hessian.clone()
        hessian.diagonal().add_(more)
        more *= MORE_DAMPING
