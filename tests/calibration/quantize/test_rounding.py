"""Rounding with error compensation: what it must gain, and where it must do no harm."""

import pytest
import torch
from torch import Tensor

from calibration.quantize.rounding import LEAST_DAMPING, fitting_damping, quantize_compensated, quantize_two_level
from morphoquant_vllm.numerics.weights import EMPTY_GROUP_SCALE, quantize_int4
from tests.calibration.quantize.problems import DAMPING, K, N, correlated_hessian, fitted_weights, loss


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_compensation_beats_rounding_each_weight_by_itself(group_size: int) -> None:
    hessian, weight = correlated_hessian(), fitted_weights()
    codes, scale = quantize_compensated(weight, hessian, group_size, DAMPING)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert (codes.shape, scale.shape) == ((N, K), (N, K // group_size))
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    assert bool((scale > 0).all())
    nearest = quantize_int4(weight, hessian.diagonal(), group_size)
    # Sixteen shared directions in 256 channels leave a fifth to a quarter of the loss.
    assert loss(hessian, weight, codes, scale) < 0.4 * loss(hessian, weight, *nearest)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_without_correlation_it_is_rounding_each_weight_by_itself(group_size: int) -> None:
    energy = torch.logspace(-2, 2, K)[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
    weight = fitted_weights()
    damped = energy + DAMPING * energy.mean()
    codes, scale = quantize_compensated(weight, energy.diag(), group_size, DAMPING)
    nearest = quantize_int4(weight, damped, group_size)
    # The clip search compares float32 sums, here in another order; fitted scales only gain.
    assert loss(damped.diag(), weight, codes, scale) <= loss(damped.diag(), weight, *nearest) * (1 + 1e-5)


def test_codes_and_scales_stand_in_channel_order() -> None:
    """Energies fall from the last channel to the first, so that columns are taken in the opposite order."""
    weight = torch.zeros(1, 64)
    weight[0, :32], weight[0, 32:] = torch.linspace(-7, 7, 32), torch.linspace(-700, 700, 32)
    codes, scale = quantize_compensated(weight, torch.arange(1.0, 65.0).diag(), 32, DAMPING)
    served = codes.float() * scale.float().repeat_interleave(32, 1)
    # Steps of about 1, and of 100. Clipping and fitting move an error past half a step; another order would cost many.
    assert float((served - weight)[:, :32].abs().max()) < 1
    assert float((served - weight)[:, 32:].abs().max()) < 100
    assert float(scale[0, 1] / scale[0, 0]) == pytest.approx(100, rel=0.1)


def test_a_dead_hessian_is_no_worse_than_rounding_each_weight_by_itself() -> None:
    codes, scale = quantize_compensated(fitted_weights(), torch.zeros(K, K), 32, DAMPING)
    nearest = quantize_int4(fitted_weights(), torch.ones(K), 32)
    assert loss(torch.eye(K), fitted_weights(), codes, scale) <= loss(torch.eye(K), fitted_weights(), *nearest)


def test_dead_channels_and_fewer_tokens_than_channels_stay_finite() -> None:
    hessian = correlated_hessian(tokens=20)
    hessian[40:80] = hessian[:, 40:80] = 0
    codes, scale = quantize_compensated(fitted_weights(), hessian, 64, DAMPING)
    assert bool((scale.isfinite() & (scale > 0)).all())
    served = codes.float() * scale.float().repeat_interleave(64, 1)
    # Weights of dead channels stay near themselves: nothing is compensated there. 3 of a normal's 4.5 sigma, 7 steps.
    assert float((served - fitted_weights())[:, 40:80].abs().max()) < 1.5


def test_groups_of_zeros_get_a_scale() -> None:
    weight = fitted_weights()
    weight[:, :32] = 0
    codes, scale = quantize_compensated(weight, torch.ones(K).diag(), 32, DAMPING)
    assert bool((codes[:, :32] == 0).all())
    # A candidate about it: which one does not matter.
    assert bool((scale[:, 0] / EMPTY_GROUP_SCALE - 1).abs().max() < 0.2)


def test_the_same_input_gives_the_same_codes_and_leaves_its_arguments() -> None:
    hessian, weight = correlated_hessian(), fitted_weights()
    before = hessian.clone(), weight.clone()
    first, second = (quantize_compensated(weight, hessian, 32, DAMPING) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(hessian, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("levels", [4, 16])
def test_two_level_scales_are_levels_of_a_scale_of_the_output(levels: int) -> None:
    hessian, weight = correlated_hessian(), fitted_weights()
    weight[3] *= 100
    codes, level, channel_scale = quantize_two_level(weight, hessian, 32, levels, DAMPING)
    assert (codes.dtype, level.dtype, channel_scale.dtype) == (torch.int8, torch.uint8, torch.float32)
    assert (level.shape, channel_scale.shape) == ((N, K // 32), (N,))
    assert int(level.min()) >= 1 and int(level.max()) <= levels and int(level.unique().numel()) > 2
    assert float(channel_scale[3] / channel_scale[2]) > 20
    scale = level.float() * channel_scale[:, None]
    nearest = quantize_int4(weight, hessian.diagonal(), 32)
    assert loss(hessian, weight, codes, scale) < loss(hessian, weight, *nearest)
    # Sixteen levels cost a few percent of the loss, four a lot; a code that was rounded against another scale, more.
    free = loss(hessian, weight, *quantize_compensated(weight, hessian, 32, DAMPING))
    assert loss(hessian, weight, codes, scale) < free * (1.2 if levels == 16 else 2)


def codes_of(tokens: int, seed: int) -> Tensor:
    """Integer codes [tokens, K] that share a few directions, the same for every seed."""
    directions = torch.randn(16, K, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 16, generator=generator) @ directions
    return (shared * 0.5 + torch.randn(tokens, K, generator=generator)).round().clamp(-8, 7)


def loss_on_others(tokens: int, damping: float) -> float:
    """The loss on other tokens of weights that are rounded by the second moments of `tokens` tokens."""
    seen, others = codes_of(tokens, 1), codes_of(4000, 2)
    codes, scale = quantize_compensated(fitted_weights(), seen.T @ seen / tokens, 32, damping)
    return loss(others.T @ others / 4000, fitted_weights(), codes, scale)


@pytest.mark.parametrize(("tokens", "gain"), [(K // 2, 0.93), (K, 0.93), (8 * K, 1.02)])
def test_fitting_damping_holds_for_other_tokens(tokens: int, gain: float) -> None:
    """With few tokens it is better than a fixed damping, with many as good: 0.86, 0.87 and 0.98 times its loss."""
    assert loss_on_others(tokens, fitting_damping(K, tokens)) < gain * loss_on_others(tokens, 0.05)


def test_damping_grows_with_channels_for_each_token() -> None:
    assert fitting_damping(512, 1024) == 2 * fitting_damping(256, 1024) == fitting_damping(256, 512)
    assert fitting_damping(64, 1e9) == LEAST_DAMPING
