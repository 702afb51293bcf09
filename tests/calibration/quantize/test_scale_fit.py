"""Scales that suit codes: least squares of free scales, coordinate descent of levels."""

import pytest
import torch
from torch import Tensor

from calibration.quantize.rounding import damp
from calibration.quantize.scale_fit import fit_levels, fit_scales
from morphoquant_vllm.numerics.weights import quantize_int4
from tests.calibration.quantize.problems import DAMPING, correlated_hessian, fitted_weights, loss


def start(group_size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hessian, weights, codes as floats and scales of weights rounded by themselves."""
    damped, weight = damp(correlated_hessian(), DAMPING), fitted_weights()
    codes, scale = quantize_int4(weight, damped.diagonal(), group_size)
    return damped, weight, codes.float(), scale.float()


def test_no_other_free_scale_loses_less() -> None:
    damped, weight, codes, scale = start()
    fitted = fit_scales(weight @ damped, damped, codes, scale)
    best = loss(damped, weight, codes, fitted)
    assert best < loss(damped, weight, codes, scale)
    for group in range(fitted.shape[1]):
        for factor in (0.99, 1.01):
            moved = fitted.clone()
            moved[:, group] *= factor
            assert loss(damped, weight, codes, moved) > best


def levels_of(scale: Tensor) -> tuple[Tensor, Tensor]:
    unit = scale.amax(1) / 16
    return (scale / unit[:, None]).round().clamp(1, 16), unit


def test_no_other_level_or_channel_scale_loses_less() -> None:
    damped, weight, codes, scale = start()
    level, unit = levels_of(scale)
    before = loss(damped, weight, codes, level * unit[:, None])
    for _ in range(8):
        level, unit = fit_levels(weight @ damped, damped, codes, level, unit, 16)
    best = loss(damped, weight, codes, level * unit[:, None])
    assert best < before
    assert torch.equal(level, level.round()) and float(level.min()) >= 1 and float(level.max()) <= 16
    for group in range(level.shape[1]):
        for change in (-1, 1):
            moved = level.clone()
            moved[:, group] = (moved[:, group] + change).clamp(1, 16)
            assert loss(damped, weight, codes, moved * unit[:, None]) >= best * (1 - 1e-6), "float32 sums decide ties"
    for factor in (0.995, 1.005):
        assert loss(damped, weight, codes, level * unit[:, None] * factor) > best


def test_a_group_of_zeros_keeps_its_level() -> None:
    damped, weight, codes, scale = start()
    codes[:, :32] = 0
    level, unit = levels_of(scale)
    found, channel_scale = fit_levels(weight @ damped, damped, codes, level, unit, 16)
    assert torch.equal(found[:, 0], level[:, 0])
    assert bool((channel_scale > 0).all())


def test_an_output_of_zeros_keeps_its_channel_scale() -> None:
    damped, weight, codes, scale = start()
    codes[3] = 0
    level, unit = levels_of(scale)
    found, channel_scale = fit_levels(weight @ damped, damped, codes, level, unit, 16)
    assert torch.equal(found[3], level[3]) and float(channel_scale[3]) == float(unit[3])


def test_fits_do_not_depend_on_how_many_rows_are_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (50, 128), generator=generator).float()
    weight, x = torch.randn(50, 128, generator=generator), torch.randn(300, 128, generator=generator)
    scale = torch.full((50, 4), 0.1)
    damped = damp(x.T @ x, DAMPING)
    aimed = weight @ damped
    expected = fit_scales(aimed, damped, codes, scale)
    level, unit = fit_levels(aimed, damped, codes, *levels_of(scale), 16)
    monkeypatch.setattr("calibration.quantize.scale_fit.SYSTEM_ELEMENTS", 7 * 4**2)
    monkeypatch.setattr("calibration.quantize.scale_fit.SYSTEM_CHANNELS", 64)
    # Products of other sizes may add up in another order: float32 sums of 128, systems of a condition below 100.
    torch.testing.assert_close(fit_scales(aimed, damped, codes, scale), expected, rtol=1e-4, atol=1e-6)
    found = fit_levels(aimed, damped, codes, *levels_of(scale), 16)
    assert torch.equal(found[0], level)
    torch.testing.assert_close(found[1], unit, rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [64, 160, 344])
def test_many_groups_are_solved_where_threads_were_set(groups: int) -> None:
    """The last as many as down_proj of a 3B has: MKL's LU on its own threads got it and 160 wrong."""
    rows, size = 4, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * groups * size, groups * size, generator=generator)
    codes = torch.randint(1, 8, (rows, groups * size), generator=generator).float()
    wanted = torch.rand(rows, groups, generator=generator) + 0.5
    damped = damp(x.T @ x, DAMPING)
    aimed = (codes * wanted.repeat_interleave(size, 1)) @ damped
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = fit_scales(aimed, damped, codes, wanted)
    finally:
        torch.set_num_threads(before)
    # Float32, and systems of a condition below 1000.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
