"""Weights to int4 with error compensation, on the Hessian of the integer codes that the served layer multiplies. Pure.

First GPTQ (arXiv 2210.17323): each column's rounding error is made up for by the columns after it. Then, in turns, the
scales that suit the codes best (least squares) and the codes that suit the scales best (column by column). Scales are
free (bfloat16), or two-level: level times a scale of the output channel, in float32 (float32 tensors below).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from morphoquant_vllm.numerics import weights

# Part of the mean diagonal that is added to it: keeps the factorisation stable, and the compensation modest.
DAMPING = 0.01
# Turns of fitting scales and codes to each other; each lowers the loss.
TURNS = 2
# Columns whose changes are carried over to the later ones at once.
BLOCK_COLUMNS = 64
# Part of a group's mean energy that draws its scale to the one it had: keeps groups of hardly any energy sane.
SCALE_DAMPING = 1e-4
# Rows whose scales are fitted at once, and elements of their systems [rows, K/G, K/G] at once: bounds their memory.
SCALE_ROWS = 2048
SYSTEM_ELEMENTS = 2**25
# Channels by which those of a group are multiplied at once for them: what comes of it stays in the cache.
SYSTEM_CHANNELS = 1024


def quantize_compensated(target: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale bfloat16 [N, K/G] of `target`, float32 [N, K], columns in channel order.

    hessian [K, K]: mean of code^T code in the same order. Groups are taken by falling energy, and so are the columns in
    a group: what matters most is rounded while most columns are left to make up for it.
    """
    target, damped = target.float(), _damped(hessian)
    codes, scale, aimed = _in_turns(target, damped, group_size, None, 0)
    return codes.to(torch.int8), _fit_scales(aimed, damped, codes, scale)


def quantize_two_level(target: Tensor, hessian: Tensor, group_size: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [N, K], levels uint8 [N, K/G], 1 to `levels`, and channel scale float32 [N]: see quantize_compensated.

    The scale of a group is level * channel_scale as float32 computes it, while rounding too.
    """
    target, damped = target.float(), _damped(hessian)
    unit = _unit(target, damped, group_size, levels)
    codes, scale, _ = _in_turns(target, damped, group_size, unit, levels)
    # Division gives the whole number back: either rounding errs by 2^-24 of it at most.
    return codes.to(torch.int8), (scale / unit).round().to(torch.uint8), unit[:, 0].contiguous()


def _in_turns(
    target: Tensor, damped: Tensor, group_size: int, unit: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as floats [N, K] that suit scales [N, K/G], both found in turns; and target @ damped [N, K]."""
    codes, scale = _gptq(target, damped, group_size, unit, levels)
    aimed = target @ damped
    for _ in range(TURNS):
        scale = _multiples(_fit_scales(aimed, damped, codes, scale), unit, levels)
        codes = _fit_codes(target, damped, codes, scale)
    return codes, scale, aimed


def _unit(target: Tensor, damped: Tensor, group_size: int, levels: int) -> Tensor:
    """What an output channel's scales are multiples of, float32 [N, 1]: its largest group needs the last level."""
    energy = damped.diagonal().unflatten(0, (-1, group_size))
    scale = weights.group_scales(target.unflatten(1, (-1, group_size)), energy).float()
    return scale.amax(1, keepdim=True) / levels


def _multiples(scale: Tensor, unit: Tensor | None, levels: int) -> Tensor:
    """The nearest allowed scales, shape of `scale` [N, groups]: as they are, or float32 multiples of unit [N, 1]."""
    return scale if unit is None else (scale.float() / unit).round().clamp(1, levels) * unit


def _damped(hessian: Tensor) -> Tensor:
    damped = hessian.float().clone()
    mean = damped.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(damped.shape[0], device=damped.device)
    damped.diagonal().add_(DAMPING * mean)
    return damped


def _gptq(target: Tensor, damped: Tensor, group_size: int, unit: Tensor | None, levels: int) -> tuple[Tensor, Tensor]:
    """Codes as floats [N, K] and scale [N, K/G]."""
    out_features, in_features = target.shape
    groups = in_features // group_size
    energy = damped.diagonal().view(groups, group_size)
    group_order = energy.sum(1).argsort(descending=True, stable=True)
    inner_order = energy.argsort(dim=1, descending=True, stable=True)[group_order]
    order = (group_order[:, None] * group_size + inner_order).flatten()
    upper = _inverse_factor(damped[order][:, order])
    energy = damped.diagonal()[order].view(groups, group_size)
    # Rows of memory are columns of the weights: one is worked on at a time.
    remaining = target.T[order].contiguous()
    codes = torch.empty_like(remaining)
    dtype = torch.bfloat16 if unit is None else torch.float32
    scale = torch.empty(out_features, groups, dtype=dtype, device=target.device)
    for index in range(groups):
        start, end = index * group_size, (index + 1) * group_size
        group, factor = remaining[start:end], upper[start:end, start:end]
        found = weights.group_scales(group.T.contiguous()[:, None], energy[index : index + 1])
        scale[:, group_order[index]] = group_scale = _multiples(found, unit, levels)[:, 0]
        errors = torch.empty_like(group)
        step = group_scale.float()
        for column in range(group_size):
            code = weights.round_int4(group[column], step)
            codes[start + column] = code
            errors[column] = (group[column] - code * step) / factor[column, column]
            group[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
        remaining[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    natural = remaining
    natural[order] = codes
    return natural.T.contiguous(), scale


def _fit_scales(aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scales [N, K/G], in their dtype, of least loss for codes [N, K]; a scale that would not be positive stays.

    aimed [N, K] = target @ damped.
    """
    groups = scale.shape[1]
    rows = min(SCALE_ROWS, max(1, SYSTEM_ELEMENTS // groups**2))
    parts = (field.split(rows) for field in (aimed, codes, scale))
    return torch.cat([_fit_rows(own, damped, *rest) for own, *rest in zip(*parts, strict=True)])


def _fit_rows(aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    groups = scale.shape[1]
    right = (aimed * codes).unflatten(1, (groups, -1)).sum(-1)
    return _solve_scales(damped, codes.unflatten(1, (groups, -1)), right, scale)


def _solve_scales(damped: Tensor, grouped: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """The scales [rows, groups] for codes `grouped` [rows, groups, G] and right-hand sides `right` [rows, groups]."""
    groups, group_size = grouped.shape[1:]
    codes = grouped.flatten(1).T.contiguous()
    system = torch.empty(scale.shape[0], groups, groups, device=damped.device)
    columns = SYSTEM_CHANNELS // group_size * group_size
    # Systems are symmetric: of each row what begins at the diagonal.
    for group in range(groups):
        start = group * group_size
        own = slice(start, start + group_size)
        for first in range(start, codes.shape[0], columns):
            others = slice(first, first + columns)
            product = (damped[others, own] @ codes[own]).mul_(codes[others]).unflatten(0, (-1, group_size)).sum(1)
            found = slice(first // group_size, first // group_size + product.shape[0])
            system[:, group, found] = product.T
    diagonal = system.diagonal(dim1=1, dim2=2)
    energy = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ridge = (SCALE_DAMPING * energy).expand(-1, groups)
    diagonal += ridge
    with _one_thread():
        # Transposed it has the layout of LAPACK, and its lower triangle is what was computed.
        factor, failed = torch.linalg.cholesky_ex(system.mT)
        del system, diagonal
        # Not cholesky_solve: it copies the factors, which takes longer than solving.
        half = torch.linalg.solve_triangular(factor, (right + ridge * scale.float())[..., None], upper=False)
        fitted = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0].to(scale.dtype)
    solved = (failed == 0)[:, None] & (fitted > 0) & fitted.isfinite()
    return torch.where(solved, fitted, scale)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread.

    torch deals a batch of systems out to its threads. Once a process has called torch.set_num_threads, MKL's LU
    factorises the larger of these (160 unknowns and more) wrongly, on as many threads again, and says so of the largest
    alone (torch 2.13.0+cpu on AVX512). Cholesky's was not seen to; it is not left to chance.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit_codes(target: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """One pass over the columns: each takes the codes of least loss, the other columns [N, K] as they stand."""
    group_size = codes.shape[1] // scale.shape[1]
    # Rows of memory are columns of the weights: one is worked on at a time.
    codes = codes.T.contiguous()
    step = scale.float().T.repeat_interleave(group_size, dim=0)
    gradient = damped @ (target.T - codes * step)
    energy = damped.diagonal()
    for start in range(0, codes.shape[0], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, codes.shape[0])
        near, local = gradient[start:end], damped[start:end, start:end]
        changes = torch.empty_like(near)
        for offset in range(end - start):
            own, own_step = codes[start + offset], step[start + offset]
            better = weights.round_int4(own * own_step + near[offset] / energy[start + offset], own_step)
            changes[offset] = (better - own) * own_step
            codes[start + offset] = better
            near[offset + 1 :].addr_(local[offset, offset + 1 :], changes[offset], alpha=-1)
        gradient[end:].addmm_(damped[start:end, end:].T, changes, alpha=-1)
    return codes.T.contiguous()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = hessian^-1, float32 [K, K]."""
    factor = torch.linalg.cholesky(hessian)
    # Each is [K, K]: three at once are enough.
    del hessian
    inverse = torch.cholesky_inverse(factor)
    del factor
    return torch.linalg.cholesky(inverse, upper=True)
