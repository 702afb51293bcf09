"""Which samples learn and judge, and the rates of the steps."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from calibration.learn.changes import no_changes
from calibration.learn.descent import (
    ESCAPE_POWER,
    JUDGED_TOKENS,
    LARGEST_RATIO,
    LEAST_TOKENS,
    LONGEST,
    ROUNDS,
    TOKENS,
    Chosen,
    Descent,
    choose_samples,
    rate_factor,
)
from calibration.learn.model import LearningDecoder
from calibration.learn.targets import Objective
from morphoquant_vllm.format.layers import LayerSpec


def test_every_fourth_sample_judges_and_the_others_learn() -> None:
    chosen = choose_samples([512] * 16)
    assert chosen is not None
    assert chosen.judging == [3, 7, 11, 15] and chosen.learned == [i for i in range(16) if i not in chosen.judging]


@pytest.mark.parametrize(
    "lengths",
    # No sample judges, too few tokens, and too few in samples that are short enough.
    [[2048] * 3, [LEAST_TOKENS // 4] * 4, [LONGEST + 1] * 7 + [512]],
)
def test_too_few_samples_learn_nothing(lengths: list[int]) -> None:
    assert choose_samples(lengths) is None


def test_long_samples_are_left_out_and_many_are_thinned_evenly() -> None:
    chosen = choose_samples([LONGEST + 1, *[1024] * 256])
    assert chosen is not None and 0 not in chosen.learned
    assert len(chosen.learned) == TOKENS // 1024 and len(chosen.judging) == JUDGED_TOKENS // 1024
    gaps = [after - before for before, after in zip(chosen.learned, chosen.learned[1:], strict=False)]
    assert min(gaps) >= 2 and max(gaps) <= 5


@pytest.mark.parametrize(("samples", "rounds"), [(16, ROUNDS), (4 * TOKENS // 1024 // 6, 2), (256, 1)])
def test_few_samples_are_learned_from_several_times_in_new_orders(samples: int, rounds: int) -> None:
    chosen = choose_samples([1024] * samples)
    assert chosen is not None and chosen.rounds == rounds
    changes = no_changes({}, {}, torch.device("cpu"))
    changes.constants["a"] = torch.zeros(1, requires_grad=True)
    decoder = cast(LearningDecoder, SimpleNamespace(changes=changes))
    made = Descent(decoder, cast(Objective, None), chosen, lambda index: pytest.fail("no sample"), 0)
    count = len(chosen.learned)
    orders = [made.order[start : start + count] for start in range(0, made.steps, count)]
    assert len(orders) == rounds and all(sorted(order) == sorted(chosen.learned) for order in orders)
    assert all(order != orders[0] for order in orders[1:])


def test_steps_of_inputs_with_too_many_escapes_grow() -> None:
    layers = {name: LayerSpec(64, 32, 32, "column", name) for name in ("more", "fewer", "none", "far_more")}
    changes = no_changes(layers, dict.fromkeys(layers, 1.0), torch.device("cpu"))
    decoder = cast(LearningDecoder, SimpleNamespace(changes=changes))
    made = Descent(decoder, cast(Objective, None), Chosen([0], [1]), lambda index: pytest.fail("no sample"), 0)
    allowed = {"more": 0.04, "fewer": 0.04, "none": 0.0, "far_more": 0.01}
    made.keep_rates(allowed, {"more": 0.044, "fewer": 0.03, "none": 0.001, "far_more": 0.1})
    grown = {name: float(step[0].detach().exp()) for name, step in changes.steps.items()}
    most = LARGEST_RATIO ** (1 / ESCAPE_POWER)
    assert grown == pytest.approx({"more": 1.1 ** (1 / ESCAPE_POWER), "fewer": 1, "none": most, "far_more": most})


def _descent(steps: int) -> Descent:
    """One that learns a constant, whose derivative is -1 at each of `steps` steps."""
    changes = no_changes({}, {}, torch.device("cpu"))
    constant = changes.constants["a"] = torch.zeros(1, requires_grad=True)

    def back(*_: object) -> None:
        constant.grad = -torch.ones(1)

    decoder = SimpleNamespace(changes=changes, states=lambda sample: [torch.zeros(1, 1, 1)], back=back)
    objective = SimpleNamespace(derivatives=lambda last, target: (0.0, torch.zeros(1, 1)))
    chosen = Chosen(list(range(steps)), [steps])
    read = cast(Any, lambda index: (None, None))
    return Descent(cast(LearningDecoder, decoder), cast(Objective, objective), chosen, read, 0)


def test_the_mean_is_that_of_the_later_half_of_the_steps_also_after_a_restart() -> None:
    made, values = _descent(12), []
    for index in range(12):
        made.step(index)
        values.append(float(made.learned()["constant a"]))
        if index == 7:
            state = made.state()
    assert values == sorted(values) and values[0] > 0
    again = _descent(12)
    again.restore(state)
    for index in range(8, 12):
        again.step(index)
    for each in (made, again):
        each.take_mean()
        # The mean of six numbers is summed in another order.
        assert float(each.learned()["constant a"]) == pytest.approx(sum(values[6:]) / 6, rel=1e-6)


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[49] == 1.0 and factors[75] == pytest.approx(0.5) and 0 < factors[99] < 0.03
