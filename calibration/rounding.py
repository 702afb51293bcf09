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


def quantize_compensated(target: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale bfloat16 [N, K/G] of `target`, float32 [N, K], columns in channel order.

    hessian [K, K]: mean of code^T code in the same order. Groups are taken by falling energy, and so are the columns in
    a group: what matters most is rounded while most columns are left to make up for it.
    """
    target, damped = target.float(), _damped(hessian)
    codes, scale = _in_turns(target, damped, group_size, None, 0)
    return codes.to(torch.int8), _fit_scales(target, damped, codes, scale)


def quantize_two_level(target: Tensor, hessian: Tensor, group_size: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [N, K], levels uint8 [N, K/G], 1 to `levels`, and channel scale float32 [N]: see quantize_compensated.

    The scale of a group is level * channel_scale as float32 computes it, while rounding too.
    """
    target, damped = target.float(), _damped(hessian)
    unit = _unit(target, damped, group_size, levels)
    codes, scale = _in_turns(target, damped, group_size, unit, levels)
    # Division gives the whole number back: either rounding errs by 2^-24 of it at most.
    return codes.to(torch.int8), (scale / unit).round().to(torch.uint8), unit[:, 0].contiguous()


def _in_turns(
    target: Tensor, damped: Tensor, group_size: int, unit: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    """Codes as floats [N, K] that suit scales [N, K/G], both found in turns."""
    codes, scale = _gptq(target, damped, group_size, unit, levels)
    for _ in range(TURNS):
        scale = _multiples(_fit_scales(target, damped, codes, scale), unit, levels)
        codes = _fit_codes(target, damped, codes, scale)
    return codes, scale


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
    remaining = target[:, order].contiguous()
    codes = torch.empty_like(remaining)
    dtype = torch.bfloat16 if unit is None else torch.float32
    scale = torch.empty(out_features, groups, dtype=dtype, device=target.device)
    for index in range(groups):
        start, end = index * group_size, (index + 1) * group_size
        group = remaining[:, start:end].clone()
        group_scale = _multiples(weights.group_scales(group[:, None], energy[index : index + 1]), unit, levels)[:, 0]
        scale[:, group_order[index]] = group_scale
        factor = upper[start:end, start:end]
        errors = torch.empty_like(group)
        step = group_scale.float()
        for column in range(group_size):
            code = weights.round_int4(group[:, column], step)
            codes[:, start + column] = code
            errors[:, column] = (group[:, column] - code * step) / factor[column, column]
            group[:, column + 1 :].addr_(errors[:, column], factor[column, column + 1 :], alpha=-1)
        remaining[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural, scale


def _fit_scales(target: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scales [N, K/G], in their dtype, of least loss for codes [N, K]; a scale that would not be positive stays."""
    parts = (field.split(SCALE_ROWS) for field in (target, codes, scale))
    return torch.cat([_fit_rows(own, damped, *rest) for own, *rest in zip(*parts, strict=True)])


def _fit_rows(target: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    groups = scale.shape[1]
    grouped = codes.unflatten(1, (groups, -1))
    right = ((target @ damped).unflatten(1, (groups, -1)) * grouped).sum(-1)
    rows = max(1, SYSTEM_ELEMENTS // groups**2)
    parts = zip(grouped.split(rows), right.split(rows), scale.split(rows), strict=True)
    return torch.cat([_solve_scales(damped, *part) for part in parts])


def _solve_scales(damped: Tensor, grouped: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """The scales [rows, groups] for codes `grouped` [rows, groups, G] and right-hand sides `right` [rows, groups]."""
    out_features, groups = scale.shape
    system = torch.empty(out_features, groups, groups, device=damped.device)
    for group, columns in enumerate(damped.unflatten(0, (groups, -1))):
        system[:, group] = ((grouped[:, group] @ columns).unflatten(1, (groups, -1)) * grouped).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    energy = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ridge = (SCALE_DAMPING * energy).expand(-1, groups)
    diagonal += ridge
    with _one_thread():
        fitted = torch.linalg.solve(system, right + ridge * scale.float()).to(scale.dtype)
    return torch.where((fitted > 0) & fitted.isfinite(), fitted, scale)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread.

    torch deals a batch of systems out to its threads. Once a process has called torch.set_num_threads, MKL factorises
    the larger of these (160 unknowns and more) wrongly, on as many threads again, and says so of the largest alone
    (torch 2.13.0+cpu on AVX512).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit_codes(target: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """One pass over the columns: each takes the codes of least loss, the other columns [N, K] as they stand."""
    codes = codes.clone()
    group_size = codes.shape[1] // scale.shape[1]
    step = scale.float().repeat_interleave(group_size, dim=1)
    gradient = (target - codes * step) @ damped
    energy = damped.diagonal()
    for start in range(0, codes.shape[1], BLOCK_COLUMNS):
        columns = slice(start, start + BLOCK_COLUMNS)
        near, local = gradient[:, columns].clone(), damped[columns, columns]
        changes = torch.zeros_like(near)
        for offset in range(near.shape[1]):
            column = start + offset
            wanted = codes[:, column] * step[:, column] + near[:, offset] / energy[column]
            better = weights.round_int4(wanted, step[:, column])
            changes[:, offset] = (better - codes[:, column]) * step[:, column]
            codes[:, column] = better
            near.addr_(changes[:, offset], local[offset], alpha=-1)
        gradient.addmm_(changes, damped[columns], alpha=-1)
    return codes


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = hessian^-1, float32 [K, K]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)
