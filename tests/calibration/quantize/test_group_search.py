"""The search over groups: each step lowers the loss, and only allowed scales come out."""

from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from calibration.quantize import group_search
from calibration.quantize.allowed_scales import AllowedScales, FreeScales, LevelScales
from calibration.quantize.group_search import compensate, improve, inverse_factor, round_group
from calibration.quantize.rounding import damp
from morphoquant_vllm.numerics.weights import quantize_int4, round_int4
from tests.calibration.quantize.problems import DAMPING, K, N, correlated_hessian, fitted_weights, loss

FREE = FreeScales()
LEVELS = LevelScales(torch.full((N,), 0.04), 16)


def allowed_scales(scale: Tensor, allowed: AllowedScales) -> bool:
    """Whether every scale [N, K/G] is one of the allowed."""
    if isinstance(allowed, LevelScales):
        return torch.equal(allowed.level(scale.T) * allowed.channel_scale, scale.T)
    return torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("allowed", [FREE, LEVELS], ids=["free", "levels"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_turn_lowers_the_loss(group_size: int, allowed: AllowedScales) -> None:
    damped, weight = damp(correlated_hessian(), DAMPING), fitted_weights()
    codes, scale = compensate(weight, damped, group_size, allowed)
    losses = [loss(damped, weight, codes, scale)]
    for _ in range(2):
        scale, allowed = allowed.fitted(weight @ damped, damped, codes, scale)
        losses.append(loss(damped, weight, codes, scale))
        codes, scale = improve(weight, damped, codes, scale, allowed)
        assert float(codes.min()) >= -8 and float(codes.max()) <= 7 and torch.equal(codes, codes.round())
        assert allowed_scales(scale, allowed)
        losses.append(loss(damped, weight, codes, scale))
    # Fitted scales are rounded to bfloat16, which may give back the little that there was to gain: 2^-8 of a step.
    assert all(later < earlier * (1 + 1e-3) for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0]


def test_a_wider_beam_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    damped, weight = damp(correlated_hessian(), DAMPING), fitted_weights()
    losses = []
    for beam in (1, 4, 16):
        monkeypatch.setattr(group_search, "BEAM", beam)
        losses.append(loss(damped, weight, *compensate(weight, damped, 32, LEVELS)))
    # A beam is no promise for one output; over twenty it gained 2 % and more each time.
    assert losses[0] > 1.01 * losses[1] > 1.01 * losses[2]


@dataclass(frozen=True)
class FixedScales(FreeScales):
    """The same few scales for every group."""

    scales: tuple[float, ...] = ()

    def candidates(self, scale: Tensor, *, far: bool) -> Tensor:
        return torch.stack([torch.full_like(scale, value) for value in self.scales])


class OneAfterTheOther(FixedScales):
    """One scale for the first group, another for the second."""

    def candidates(self, scale: Tensor, *, far: bool) -> Tensor:
        remaining.append(self.scales[len(remaining)])
        return torch.full_like(scale, remaining[-1])[None]


remaining: list[float] = []


@pytest.mark.parametrize("columns", [32, 64], ids=["two runs", "one run"])
def test_a_beam_of_every_choice_finds_the_best_pair_of_scales(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(group_search, "RUN_COLUMNS", columns)
    damped, weight = damp(correlated_hessian(), DAMPING)[:64, :64].contiguous(), fitted_weights()[:, :64]
    monkeypatch.setattr(group_search, "BEAM", 9)
    scales = (0.25, 0.32, 0.4)
    codes, scale = compensate(weight, damped, 32, FixedScales(scales))
    found = row_losses(damped, weight, codes, scale)
    tried = []
    for pair in product(scales, scales):
        remaining.clear()
        tried.append(row_losses(damped, weight, *compensate(weight, damped, 32, OneAfterTheOther(pair))))
    least = torch.stack(tried).amin(0)
    assert bool(torch.stack(tried).argmin(0).unique().numel() > 2), "one pair is not the best for all outputs"
    # float32 sums.
    torch.testing.assert_close(found, least, rtol=1e-4, atol=0)


def row_losses(damped: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    each = [part.split(1) for part in (weight, codes, scale)]
    return torch.tensor([loss(damped, *row) for row in zip(*each, strict=True)])


@pytest.mark.parametrize("allowed", [FREE, LEVELS], ids=["free", "levels"])
def test_the_result_does_not_depend_on_how_many_rows_are_searched_at_once(
    monkeypatch: pytest.MonkeyPatch, allowed: AllowedScales
) -> None:
    damped, weight = damp(correlated_hessian(), DAMPING), fitted_weights()
    expected = compensate(weight, damped, 32, allowed)
    better = improve(weight, damped, *expected, allowed)
    monkeypatch.setattr(group_search, "SEARCH_OUTPUTS", 7)
    monkeypatch.setattr(group_search, "IMPROVE_OUTPUTS", 9)
    found = compensate(weight, damped, 32, allowed)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    found = improve(weight, damped, *expected, allowed)
    assert torch.equal(found[0], better[0]) and torch.equal(found[1], better[1])


@pytest.mark.parametrize("allowed", [FREE, LEVELS], ids=["free", "levels"])
def test_the_loss_does_not_depend_on_how_many_columns_change_at_once(
    monkeypatch: pytest.MonkeyPatch, allowed: AllowedScales
) -> None:
    damped, weight = damp(correlated_hessian(), DAMPING), fitted_weights()
    losses = []
    for columns in (32, 64, K):
        monkeypatch.setattr(group_search, "RUN_COLUMNS", columns)
        found = compensate(weight, damped, 32, allowed)
        losses.append(loss(damped, weight, *improve(weight, damped, *found, allowed)))
    # Sums in another order round some weights the other way.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_the_sum_of_squared_errors_is_the_loss() -> None:
    damped, weight = damp(correlated_hessian(), DAMPING)[:32, :32].contiguous(), fitted_weights()[:, :32].T.contiguous()
    scale = torch.stack((torch.full((N,), 0.3), torch.full((N,), 0.5)))
    codes, errors = round_group(weight, inverse_factor(damped), scale)
    for which in range(2):
        for row in range(N):
            lost = loss(damped, weight[:, row][None], codes[:, which, row][None], scale[which, row].view(1, 1))
            # float32 sums.
            assert lost == pytest.approx(float(errors[:, which, row].square().sum()), rel=1e-3)
        by_itself = round_int4(weight, scale[which])
        assert loss(damped, weight.T, codes[:, which].T, scale[which][:, None]) < loss(
            damped, weight.T, by_itself.T, scale[which][:, None]
        )


def test_improving_changes_nothing_that_cannot_be_better() -> None:
    """Weights on the grid have no error."""
    codes, scale = quantize_int4(fitted_weights(), torch.ones(K), 32)
    weight = codes.float() * scale.float().repeat_interleave(32, 1)
    found = improve(weight, damp(correlated_hessian(), DAMPING), codes.float(), scale.float(), FREE)
    assert torch.equal(found[0], codes.float()) and torch.equal(found[1], scale.float())


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = correlated_hessian().double() + torch.eye(K)
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    # float64 at a condition number of about 1e4.
    assert torch.allclose(upper.T @ upper @ hessian, torch.eye(K, dtype=torch.float64), atol=1e-9)


def test_a_hessian_without_digits_left_is_damped_further() -> None:
    """One direction in 64 channels, no damping: float32 cannot factorise that."""
    x = torch.linspace(1, 2, 64)[None]
    upper = inverse_factor(x.T @ x)
    assert bool(upper.isfinite().all()) and bool((upper.diagonal() > 0).all())
