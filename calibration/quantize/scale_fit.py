"""Least squares of scales for fixed codes: free scales, or levels and a scale of the output channel. Pure.

The loss of an output channel is quadratic in the scales s of its groups: s^T A s - 2 r^T s. A [K/G, K/G] are the
products of the groups' codes under the Hessian. r [K/G] are those of codes and fitted weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Fraction of the mean energy that draws a scale to its former value. Without it, groups of little energy would get
# arbitrary scales.
SCALE_DAMPING = 1e-4
# Outputs whose scales are fitted at once, and elements of their systems [outputs, K/G, K/G]. Both bound the memory.
SCALE_OUTPUTS = 2048
SYSTEM_ELEMENTS = 2**25
# Channels by which a group's channels are multiplied at once. The product fits into the cache.
SYSTEM_CHANNELS = 1024
# Rounds of coordinate descent: each level in turn, then the channel scale.
LEVEL_ROUNDS = 4


def fit_scales(aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scales float32 [N, K/G] of least loss for codes [N, K]; a scale that would not be positive stays unchanged.

    aimed [N, K]: the fitted weights times damped, the Hessian [K, K].
    """
    found = [_solve(system, right, scale[outputs]) for outputs, system, right in _systems(aimed, damped, codes, scale)]
    return torch.cat(found)


def fit_levels(
    aimed: Tensor, damped: Tensor, codes: Tensor, level: Tensor, channel_scale: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Levels, as floats [N, K/G], and channel scale float32 [N] of less loss for codes [N, K] than those given.

    Coordinate descent: each level in turn takes its best whole number, then the channel scale its best value.
    """
    found = [
        _descend(system, right, level[outputs], channel_scale[outputs], levels)
        for outputs, system, right in _systems(aimed, damped, codes, level)
    ]
    return torch.cat([level for level, _ in found]), torch.cat([scale for _, scale in found])


def _systems(aimed: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some outputs at a time: which, A [n, K/G, K/G] with only its upper triangle, and r [n, K/G]."""
    groups = scale.shape[1]
    step = min(SCALE_OUTPUTS, max(1, SYSTEM_ELEMENTS // groups**2))
    for first in range(0, scale.shape[0], step):
        outputs = slice(first, first + step)
        right = (aimed[outputs] * codes[outputs]).unflatten(1, (groups, -1)).sum(-1)
        yield outputs, _system(damped, codes[outputs].T.contiguous(), groups), right


def _system(damped: Tensor, codes: Tensor, groups: int) -> Tensor:
    """A [n, groups, groups] of codes [K, n]; the elements below its diagonal are not written."""
    group_size = codes.shape[0] // groups
    system = torch.empty(codes.shape[1], groups, groups, device=damped.device)
    columns = SYSTEM_CHANNELS // group_size * group_size
    for group in range(groups):
        start = group * group_size
        span = slice(start, start + group_size)
        for first in range(start, codes.shape[0], columns):
            others = slice(first, first + columns)
            product = (damped[others, span] @ codes[span]).mul_(codes[others]).unflatten(0, (-1, group_size)).sum(1)
            written = slice(first // group_size, first // group_size + product.shape[0])
            system[:, group, written] = product.T
    return system


def _solve(system: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """The scales [n, groups] that solve the systems, drawn a little to `scale`. Uses up `system`."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    energy = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ridge = (SCALE_DAMPING * energy).expand_as(scale)
    diagonal += ridge
    with _one_thread():
        # Transposed, the system has LAPACK's layout, and its lower triangle is the computed one.
        factor, failed = torch.linalg.cholesky_ex(system.mT)
        # cholesky_solve would copy the factors, which takes longer than solving.
        half = torch.linalg.solve_triangular(factor, (right + ridge * scale)[..., None], upper=False)
        fitted = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
    solved = (failed == 0)[:, None] & (fitted > 0) & fitted.isfinite()
    return torch.where(solved, fitted, scale)


def _descend(system: Tensor, right: Tensor, level: Tensor, channel_scale: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Levels [n, groups] and channel scale [n] of less loss. Completes `system`, whose upper triangle is given."""
    # In place: the systems are the largest tensors of this phase.
    for group in range(system.shape[1]):
        system[:, group + 1 :, group] = system[:, group, group + 1 :]
    # Transposed, a group is contiguous: one group is processed at a time.
    level, right = level.T.clone(), right.T
    energy = system.diagonal(dim1=1, dim2=2).T
    tiny = torch.finfo(torch.float32).tiny
    product = torch.einsum("ngh,hn->gn", system, level)
    for _ in range(LEVEL_ROUNDS):
        for group in range(level.shape[0]):
            others = product[group] - energy[group] * level[group]
            best = ((right[group] / channel_scale - others) / energy[group].clamp(min=tiny)).round()
            # The level of a group without energy stays.
            best = torch.where(best.isfinite() & (energy[group] > 0), best.clamp(1, levels), level[group])
            product += system[:, group].T * (best - level[group])
            level[group] = best
        fitted = (right * level).sum(0) / (product * level).sum(0).clamp(min=tiny)
        channel_scale = torch.where((fitted > 0) & fitted.isfinite(), fitted, channel_scale)
    return level.T.contiguous(), channel_scale


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread.

    torch divides a batch of systems among its threads, and each thread's MKL call uses as many threads again. After a
    process has called torch.set_num_threads, LU then factorises systems of 160 unknowns and more wrongly. It reports an
    error only for the largest ones (torch 2.13.0+cpu on AVX512). Cholesky was not seen to fail, but one thread is safe.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
