"""Rounding with error compensation: what it must gain, and where it must do no harm."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from calibration.quantize.rounding import (
    DAMPING,
    _damped,
    _fit_codes,
    _fit_scales,
    _inverse_factor,
    _solve_scales,
    quantize_compensated,
    quantize_two_level,
)
from morphoquant_vllm.numerics.weights import EMPTY_GROUP_SCALE, quantize_int4

K, N = 256, 20


def correlated_hessian(seed: int = 0, tokens: int = 1000) -> Tensor:
    """Second moments [K, K] of integer codes that share a few directions, as those of a layer's input do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, K, generator=generator)
    codes = (shared * 0.5 + torch.randn(tokens, K, generator=generator)) * torch.rand(K, generator=generator) * 2
    codes = codes.round().clamp(-8, 7)
    return codes.T @ codes / tokens


def target(seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def loss(hessian: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    """The output's square error, summed over outputs."""
    served = codes.double().unflatten(1, (scale.shape[1], -1)) * scale.double()[..., None]
    gap = served.flatten(1) - weight.double()
    return float(((gap @ hessian.double()) * gap).sum())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_compensation_beats_rounding_each_weight_by_itself(group_size: int) -> None:
    hessian, weight = correlated_hessian(), target()
    codes, scale = quantize_compensated(weight, hessian, group_size)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert (codes.shape, scale.shape) == ((N, K), (N, K // group_size))
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    assert bool((scale > 0).all())
    nearest = quantize_int4(weight, hessian.diagonal(), group_size)
    # Sixteen shared directions in 256 channels leave a fifth to a quarter of the loss.
    assert loss(hessian, weight, codes, scale) < 0.4 * loss(hessian, weight, *nearest)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_turn_lowers_the_loss(group_size: int) -> None:
    damped, weight = _damped(correlated_hessian()), target()
    codes, scale = quantize_int4(weight, damped.diagonal(), group_size)
    codes = codes.float()
    losses = [loss(damped, weight, codes, scale)]
    for _ in range(2):
        scale = _fit_scales(weight @ damped, damped, codes, scale)
        losses.append(loss(damped, weight, codes, scale))
        codes = _fit_codes(weight, damped, codes, scale)
        assert float(codes.min()) >= -8 and float(codes.max()) <= 7
        losses.append(loss(damped, weight, codes, scale))
    # Fitted scales are rounded to bfloat16, which may give back what there was to gain: 2^-8 of a step.
    assert all(later < earlier * (1 + 1e-3) for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0]


def test_one_code_more_or_less_does_not_pay() -> None:
    """After enough passes no single code can be changed to lower the loss."""
    damped, weight = _damped(correlated_hessian())[:96, :96].contiguous(), target()[:2, :96]
    codes, scale = quantize_int4(weight, damped.diagonal(), 32)
    codes = codes.float()
    for _ in range(30):
        codes = _fit_codes(weight, damped, codes, scale)
    best = loss(damped, weight, codes, scale)
    for row in range(2):
        for column in range(96):
            for change in (-1, 1):
                moved = codes.clone()
                moved[row, column] += change
                if -8 <= float(moved[row, column]) <= 7:
                    # float32 gradients decide between codes of equal loss.
                    assert loss(damped, weight, moved, scale) >= best * (1 - 1e-5)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_without_correlation_it_is_rounding_each_weight_by_itself(group_size: int) -> None:
    energy = torch.logspace(-2, 2, K)[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
    weight = target()
    damped = energy + DAMPING * energy.mean()
    codes, scale = quantize_compensated(weight, energy.diag(), group_size)
    nearest = quantize_int4(weight, damped, group_size)
    # The clip search compares float32 sums, here in another order; fitted scales only gain.
    assert loss(damped.diag(), weight, codes, scale) <= loss(damped.diag(), weight, *nearest) * (1 + 1e-5)


def test_codes_and_scales_stand_in_channel_order() -> None:
    """Energies fall from the last channel to the first, so that columns are taken in the opposite order."""
    weight = torch.zeros(1, 64)
    weight[0, :32], weight[0, 32:] = torch.linspace(-7, 7, 32), torch.linspace(-700, 700, 32)
    codes, scale = quantize_compensated(weight, torch.arange(1.0, 65.0).diag(), 32)
    served = codes.float() * scale.float().repeat_interleave(32, 1)
    # Steps of about 1, and of 100. Clipping and fitting move an error past half a step; another order would cost many.
    assert float((served - weight)[:, :32].abs().max()) < 1
    assert float((served - weight)[:, 32:].abs().max()) < 100
    assert float(scale[0, 1] / scale[0, 0]) == pytest.approx(100, rel=0.1)


def test_a_dead_hessian_is_no_worse_than_rounding_each_weight_by_itself() -> None:
    codes, scale = quantize_compensated(target(), torch.zeros(K, K), 32)
    nearest = quantize_int4(target(), torch.ones(K), 32)
    assert loss(torch.eye(K), target(), codes, scale) <= loss(torch.eye(K), target(), *nearest)


def test_dead_channels_and_fewer_tokens_than_channels_stay_finite() -> None:
    hessian = correlated_hessian(tokens=20)
    hessian[40:80] = hessian[:, 40:80] = 0
    codes, scale = quantize_compensated(target(), hessian, 64)
    assert bool((scale.isfinite() & (scale > 0)).all())
    served = codes.float() * scale.float().repeat_interleave(64, 1)
    # Weights of dead channels stay near themselves: nothing is compensated there. 3 of a normal's 4.5 sigma, 7 steps.
    assert float((served - target())[:, 40:80].abs().max()) < 1.5


def test_groups_of_zeros_get_a_scale() -> None:
    weight = target()
    weight[:, :32] = 0
    codes, scale = quantize_compensated(weight, torch.ones(K).diag(), 32)
    assert bool((codes[:, :32] == 0).all())
    assert bool((scale[:, 0] == EMPTY_GROUP_SCALE).all())


def test_the_same_input_gives_the_same_codes_and_leaves_its_arguments() -> None:
    hessian, weight = correlated_hessian(), target()
    before = hessian.clone(), weight.clone()
    first, second = (quantize_compensated(weight, hessian, 32) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(hessian, before[0]) and torch.equal(weight, before[1])


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = correlated_hessian().double() + torch.eye(K)
    upper = _inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    # float64 at a condition number of about 1e4.
    assert torch.allclose(upper.T @ upper @ hessian, torch.eye(K, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("levels", [4, 16])
def test_two_level_scales_are_levels_of_a_scale_of_the_output(levels: int) -> None:
    hessian, weight = correlated_hessian(), target()
    weight[3] *= 100
    codes, level, channel_scale = quantize_two_level(weight, hessian, 32, levels)
    assert (codes.dtype, level.dtype, channel_scale.dtype) == (torch.int8, torch.uint8, torch.float32)
    assert (level.shape, channel_scale.shape) == ((N, K // 32), (N,))
    assert int(level.min()) >= 1 and int(level.max()) <= levels and int(level.unique().numel()) > 2
    assert float(channel_scale[3] / channel_scale[2]) > 20
    scale = level.float() * channel_scale[:, None]
    nearest = quantize_int4(weight, hessian.diagonal(), 32)
    assert loss(hessian, weight, codes, scale) < loss(hessian, weight, *nearest)
    # Sixteen levels cost a few percent of the loss, four a lot; a code that was rounded against another scale, more.
    free = loss(hessian, weight, *quantize_compensated(weight, hessian, 32))
    assert loss(hessian, weight, codes, scale) < free * (1.2 if levels == 16 else 2)


def test_codes_are_rounded_against_the_stored_two_level_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit of level * channel_scale in float32."""
    used = []

    def fit_codes(target: Tensor, damped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        used.append(scale)
        return _fit_codes(target, damped, codes, scale)

    monkeypatch.setattr("calibration.quantize.rounding._fit_codes", fit_codes)
    _, level, channel_scale = quantize_two_level(target(), correlated_hessian(), 32, 16)
    assert used[-1].dtype is torch.float32
    assert torch.equal(used[-1], level.float() * channel_scale[:, None])


def test_scales_do_not_depend_on_how_many_rows_are_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (50, 128), generator=generator).float()
    target, x = torch.randn(50, 128, generator=generator), torch.randn(300, 128, generator=generator)
    scale = torch.full((50, 4), 0.1).bfloat16()
    damped = _damped(x.T @ x)
    expected = _fit_scales(target @ damped, damped, codes, scale)
    monkeypatch.setattr("calibration.quantize.rounding.SYSTEM_ELEMENTS", 7 * 4**2)
    monkeypatch.setattr("calibration.quantize.rounding.SYSTEM_CHANNELS", 64)
    assert torch.equal(_fit_scales(target @ damped, damped, codes, scale), expected)


@pytest.mark.parametrize("groups", [64, 160, 344])
def test_many_groups_are_solved_where_threads_were_set(groups: int) -> None:
    """The last as many as down_proj of a 3B has: MKL's LU on its own threads got it and 160 wrong."""
    rows, size = 4, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * groups * size, groups * size, generator=generator)
    grouped = torch.randint(1, 8, (rows, groups, size), generator=generator).float()
    wanted = torch.rand(rows, groups, generator=generator) + 0.5
    damped = _damped(x.T @ x)
    right = ((grouped * wanted[..., None]).flatten(1) @ damped).unflatten(1, (groups, size)).mul(grouped).sum(-1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = _solve_scales(damped, grouped, right, wanted)
    finally:
        torch.set_num_threads(before)
    # Float32, and systems of a condition below 1000.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
