"""Steps against a budget of escapes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from calibration.quantize.step_search import CANDIDATES, Losses, budget_grid, candidate_steps, centres, choose, losses
from morphoquant_vllm.numerics.activation import GUARD_CODES, Grid, act_quant, activation_record, dequantize, escapes

K, TOKENS = 48, 2000


def heavy_tailed(seed: int = 0) -> Tensor:
    """x [T, K] of channels of unlike sizes and tails, some one-sided."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, K, generator=generator) * torch.logspace(-2, 2, K)
    x[:, ::3] *= torch.randn(TOKENS, K // 3, generator=generator).exp()
    x[:, ::8] = x[:, ::8].abs() * 0.1 + 5
    return x


def grid_of(x: Tensor, budget: float, share: Tensor | None = None) -> Grid:
    share = torch.ones(K) if share is None else share
    weight = torch.full(x.shape[:1], 1 / x.shape[0])
    return budget_grid([(x, weight, weight[:, None])], centres(x), x.amin(0), x.amax(0), share, budget)


def serve(x: Tensor, grid: Grid, budget: float) -> tuple[Tensor, Tensor]:
    """Codes and what they stand for, as the served quantizer gives them."""
    width = grid.step.numel()
    record = activation_record(
        step=grid.step,
        channel_order=torch.arange(width).int(),
        mask=torch.full((1, width), budget > 0),
        centre=grid.centre[None],
        gain=torch.ones(1),
        massive_channel=torch.zeros(1, 1, dtype=torch.int32),
        massive_low=torch.ones(1, 1),
        massive_high=-torch.ones(1, 1),
    )
    rows = torch.zeros(x.shape[0], dtype=torch.int32)
    codes = act_quant(x, rows, record)
    return codes, dequantize(codes, rows, record)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.04, 0.2])
def test_served_codes_keep_the_budget(budget: float) -> None:
    x = heavy_tailed()
    codes, _ = serve(x, grid_of(x, budget), budget)
    rate = float(escapes(codes).float().mean())
    # The search divides by the step, serving multiplies by its inverse: codes at a tie may go the other way.
    assert rate <= budget + 1e-4
    assert rate > budget / 2, "a budget that could be used and is not is lost accuracy"


def test_the_budget_is_kept_in_the_mean_of_the_weights() -> None:
    """Rare tokens that weigh much must not escape more than their part."""
    x = heavy_tailed()
    x[:100] *= 20
    weight = torch.full((TOKENS,), 0.5 / (TOKENS - 100))
    weight[:100] = 0.5 / 100
    grid = budget_grid([(x, weight, weight[:, None])], centres(x), x.amin(0), x.amax(0), torch.ones(K), 0.04)
    codes, _ = serve(x, grid, 0.04)
    assert float(weight @ escapes(codes).float().mean(1)) <= 0.04 + 1e-4  # ties, as above


def test_the_budget_is_kept_in_every_modality() -> None:
    """A modality whose values are larger throughout would escape throughout: each has the budget to itself."""
    x = heavy_tailed()
    loud = torch.arange(TOKENS) < 300
    x[loud] *= 4
    weight = torch.full((TOKENS,), 1 / TOKENS)
    shares = torch.stack([which / which.sum() for which in (loud.float(), (~loud).float())], 1)
    together = budget_grid([(x, weight, weight[:, None])], centres(x), x.amin(0), x.amax(0), torch.ones(K), 0.04)
    apart = budget_grid([(x, weight, shares)], centres(x), x.amin(0), x.amax(0), torch.ones(K), 0.04)
    rates = []
    for grid in (together, apart):
        codes, _ = serve(x, grid, 0.04)
        rates.append([float(escapes(codes[which]).float().mean()) for which in (loud, ~loud)])
    assert rates[0][0] > 0.06, "or there is nothing to see here"
    # Ties, as above.
    assert max(rates[1]) <= 0.04 + 1e-4
    assert max(rates[1]) > 0.03


def test_error_falls_as_the_budget_grows() -> None:
    x = heavy_tailed()
    share = torch.linspace(0.1, 2, K)
    errors = []
    for budget in (0.0, 0.002, 0.01, 0.05, 0.2):
        _, served = serve(x, grid_of(x, budget, share), budget)
        errors.append(float(((served - x).square() * share).mean()))
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_nothing_seen_saturates_where_channels_may_escape() -> None:
    x = heavy_tailed()
    x[3] *= 30
    # The farthest values may lie outside the searched sample.
    weight = torch.full((TOKENS - 10,), 1 / (TOKENS - 10))
    grid = budget_grid([(x[10:], weight, weight[:, None])], centres(x[10:]), x.amin(0), x.amax(0), torch.ones(K), 0.04)
    codes, _ = serve(x, grid, 0.04)
    # The farthest value sits at GUARD_CODES exactly; float32 noise may round it to the next code.
    assert int(codes.int().abs().max()) <= GUARD_CODES + 1
    assert bool((grid.guard_raise == 1).all()), "the search itself keeps away from saturation"


def test_without_a_budget_no_code_leaves_four_bits() -> None:
    x = heavy_tailed()
    grid = grid_of(x, 0.0)
    codes, served = serve(x, grid, 0.0)
    assert not bool(escapes(codes).any())
    assert bool((grid.guard_raise == 1).all())
    # Clipping pays on tails: the search does better than the range that holds everything.
    farthest = torch.maximum((x.amax(0) - grid.centre).abs(), (x.amin(0) - grid.centre).abs())
    _, widest = serve(x, grid._replace(step=2 * farthest / 15), 0.0)
    assert float((served - x).square().sum()) < float((widest - x).square().sum())


def test_escapes_go_where_the_output_gains_most() -> None:
    x = torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(4))
    share = torch.where(torch.arange(K) < 8, 100.0, 1.0)
    codes, _ = serve(x, grid_of(x, 0.02, share), 0.02)
    rate = escapes(codes).float().mean(0)
    assert float(rate[:8].mean()) > 5 * float(rate[8:].mean())


def test_choose_takes_the_least_error_within_the_budget() -> None:
    """Small enough to try every choice: Lagrange's price finds one that no other within its escapes beats."""
    generator = torch.Generator().manual_seed(5)
    found = Losses(torch.rand(4, 3, generator=generator), torch.rand(1, 4, 3, generator=generator).sort(1).values)
    found.escape[0, 0] = 0.0
    choices = torch.cartesian_prod(*[torch.arange(4)] * 3)
    error = found.error.T[torch.arange(3), choices].sum(1)
    escape = found.escape[0].T[torch.arange(3), choices].mean(1)
    for budget in (0.0, 0.1, 0.3, 1.0):
        chosen = choose(found, budget)
        spent = float(found.escape[0].gather(0, chosen[None]).mean())
        assert spent <= budget + 1e-6
        least = float(found.error.gather(0, chosen[None]).sum())
        # float32 sums of three terms.
        assert least <= float(error[escape <= spent + 1e-6].min()) * (1 + 1e-6)


def test_losses_are_those_of_rounding() -> None:
    x = torch.tensor([[0.4, 9.0], [-0.6, -20.0]])
    steps = torch.tensor([[1.0, 1.0], [0.5, 2.0]])
    weight, share = torch.tensor([0.75, 0.25]), torch.tensor([1.0, 10.0])
    free = losses([(x, weight, weight[:, None])], torch.zeros(2), steps, share, escapes=True)
    expected = torch.tensor([[0.75 * 0.16 + 0.25 * 0.16, 0.0], [0.75 * 0.01 + 0.25 * 0.01, 10 * 0.75 * 1.0]])
    assert torch.allclose(free.error, expected, atol=1e-6)  # float32
    assert free.escape.tolist() == [[[0.0, 1.0], [0.0, 0.25]]]
    clipped = losses([(x, weight, weight[:, None])], torch.zeros(2), steps, share, escapes=False)
    assert clipped.escape.abs().max() == 0
    assert clipped.error[0, 1].item() == pytest.approx(10 * (0.75 * 4 + 0.25 * 144))


def test_losses_of_chunks_are_those_of_all() -> None:
    x, weight = heavy_tailed(), torch.rand(TOKENS, generator=torch.Generator().manual_seed(6))
    steps = candidate_steps(x.abs().amax(0))
    assert steps.shape == (CANDIDATES, K)
    assert bool((steps.diff(dim=0) < 0).all())
    whole = losses([(x, weight, weight[:, None])], torch.zeros(K), steps, torch.ones(K), escapes=True)
    parts = zip(x.split(300), weight.split(300), weight[:, None].split(300), strict=True)
    chunked = losses(parts, torch.zeros(K), steps, torch.ones(K), escapes=True)
    # float32 sums of 2000 positive terms in another order.
    for ours, theirs in zip((chunked.error, chunked.escape), (whole.error, whole.escape), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_largest_value_lies_on_no_tie() -> None:
    """It comes again with its token: at a tie, backends would disagree about its code."""
    farthest = torch.logspace(-3, 3, K)
    code = farthest / candidate_steps(farthest)
    assert bool(((code - code.floor() - 0.5).abs() > 1e-3).all())
    assert float(code.max()) == pytest.approx(GUARD_CODES)
    assert 7 < float(code.min()) < 7.5


def test_centres_are_real_valued_and_zero_for_channels_about_zero() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, 3, generator=generator)
    x[:, 1] = 20 + torch.rand(TOKENS, generator=generator)
    x[0, 1] = 1e4  # one outlier does not move it
    x[:, 2] = -3.0
    assert centres(x)[0] == 0
    assert centres(x)[1].item() == pytest.approx(20.5, abs=0.02)
    assert centres(x)[2] == -3


@pytest.mark.parametrize("budget", [0.0, 0.04])
def test_dead_channels_have_finite_positive_steps(budget: float) -> None:
    x = heavy_tailed()
    x[:, 4], x[:, 5] = 0.0, -7.0
    grid = grid_of(x, budget)
    assert bool((grid.step.isfinite() & (grid.step > 0) & (1 / grid.step).isfinite()).all())
    codes, served = serve(x, grid, budget)
    assert int(codes[:, 4:6].abs().max()) == 0
    assert torch.equal(served[:, 4:6], x[:, 4:6])
    nothing = grid_of(torch.zeros(TOKENS, K), budget)
    assert bool((nothing.step == 1).all())
