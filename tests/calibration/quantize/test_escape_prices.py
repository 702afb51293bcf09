"""One price of escapes for all inputs: where they save most, within the mean, the least and the most."""

import pytest
import torch

from calibration.quantize.bit_losses import Probe
from calibration.quantize.escape_prices import LEAST, MOST, EscapeCosts, escape_costs, share_budget

K, N, T = 64, 48, 800


def costs(scale: float = 1.0, seed: int = 0, channels: int = K) -> EscapeCosts:
    """Of an input whose errors matter `scale` times as much for the model's output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, channels, generator=generator)
    # Long tails: something to escape.
    x[torch.rand(x.shape, generator=generator) < 0.02] *= 8
    gradient, matrix = torch.randn(T, N, generator=generator), torch.randn(N, channels, generator=generator)
    return escape_costs(Probe(x, gradient * scale**0.5, matrix))


def mean(budgets: dict[str, float], found: dict[str, EscapeCosts]) -> float:
    total = sum(cost.channels for cost in found.values())
    return sum(budgets[name] * cost.channels for name, cost in found.items()) / total


def test_a_dearer_escape_is_rarer() -> None:
    cost = costs()
    rates = [cost.rate(float(cost.error.max()) * price) for price in (1e-6, 1e-3, 1e-1, 1e2)]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.05 and rates[-1] < 0.01


def test_inputs_that_matter_more_get_more() -> None:
    found = {"much": costs(8.0), "some": costs(1.0, 1), "little": costs(0.1, 2)}
    budgets = share_budget(found, 0.04)
    assert budgets["much"] > budgets["some"] > budgets["little"]
    assert 0.9 * 0.04 < mean(budgets, found) <= 0.04


def test_equal_inputs_get_the_budget_itself() -> None:
    found = {name: costs() for name in "abc"}
    assert all(budget == pytest.approx(0.04, rel=0.15) for budget in share_budget(found, 0.04).values())


def test_the_mean_weighs_channels() -> None:
    """An input of many channels has as many escapes."""
    found = {"wide": costs(1.0, channels=256), "narrow": costs(30.0, 1, channels=32)}
    budgets = share_budget(found, 0.04)
    assert budgets["narrow"] > 2 * 0.04 and budgets["wide"] > 0.02
    assert 0.9 * 0.04 < mean(budgets, found) <= 0.04


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_no_input_gets_nothing_and_none_gets_all(scale: float) -> None:
    budgets = share_budget({"a": costs(scale), "b": costs(1.0, 1)}, 0.04)
    assert min(budgets.values()) >= LEAST * 0.04 and max(budgets.values()) <= MOST * 0.04


def test_large_budgets_stay_within_what_a_recipe_may_ask_for() -> None:
    assert max(share_budget({"a": costs(100.0), "b": costs(1.0, 1)}, 0.15).values()) <= 0.2


def test_costs_that_compare_nothing_share_nothing() -> None:
    found = costs()
    broken = EscapeCosts(found.error * float("nan"), found.escape)
    nothing = EscapeCosts(found.error * 0, found.escape)
    assert (
        share_budget({"a": found, "b": broken}, 0.04)
        == share_budget({"a": nothing}, 0.04)
        == share_budget({}, 0.04)
        == {}
    )
    assert share_budget({"a": found, "b": nothing}, 0.04)["b"] == pytest.approx(LEAST * 0.04, rel=0.01)
