"""The steps: their order, rates and mean, and what keeps the rates of escapes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from calibration.learn.changes import Changes, no_changes
from calibration.learn.descent import ESCAPE_POWER, LARGEST_RATIO, Descent, learning_rate_factor
from calibration.learn.extent import Chosen, Extent
from calibration.learn.model import LearningDecoder
from calibration.learn.targets import Objective
from morphoquant_vllm.format.layers import TWO_LEVEL_SCHEME, LayerSpec

EXTENT = Extent(tokens=2**16, most_passes=4, judgements=8, judged_tokens=2**13, learning_rate=3e-4)


@pytest.mark.parametrize("passes", [1, 3])
def test_samples_are_learned_from_in_a_new_order_each_time(passes: int) -> None:
    chosen = Chosen(list(range(1, 17)), [0], 16 * passes)
    decoder = cast(LearningDecoder, SimpleNamespace(changes=_one_constant()))
    made = Descent(decoder, cast(Objective, None), chosen, lambda index: pytest.fail("no sample"), 0, EXTENT)
    orders = [made.order[start : start + 16] for start in range(0, made.updates, 16)]
    assert len(orders) == passes and all(sorted(order) == chosen.learned for order in orders)
    assert all(order != orders[0] for order in orders[1:])
    judged = [index for index in range(made.updates) if made.is_judged(index)]
    assert len(judged) == 8 and judged[-1] == made.updates - 1


def _one_constant() -> Changes:
    changes = no_changes({}, {}, torch.device("cpu"))
    changes.constants["a"] = torch.zeros(1, requires_grad=True)
    return changes


def test_steps_of_inputs_with_too_many_escapes_grow() -> None:
    layers = {
        name: LayerSpec(64, 32, 32, "column", name, scale_scheme=TWO_LEVEL_SCHEME)
        for name in ("more", "fewer", "none", "far_more")
    }
    changes = no_changes(layers, dict.fromkeys(layers, 1.0), torch.device("cpu"))
    decoder = cast(LearningDecoder, SimpleNamespace(changes=changes, spec=SimpleNamespace(layers=layers)))
    made = Descent(
        decoder, cast(Objective, None), Chosen([0], [1], 1), lambda index: pytest.fail("no sample"), 0, EXTENT
    )
    allowed = {"more": 0.04, "fewer": 0.04, "none": 0.0, "far_more": 0.01}
    made.keep_escape_rates(allowed, {"more": 0.044, "fewer": 0.03, "none": 0.001, "far_more": 0.1})
    grown = {name: float(step[0].detach().exp()) for name, step in changes.steps.items()}
    most = LARGEST_RATIO ** (1 / ESCAPE_POWER)
    assert grown == pytest.approx({"more": 1.1 ** (1 / ESCAPE_POWER), "fewer": 1, "none": most, "far_more": most})
    # Smaller codes times larger scales: the outputs keep their size.
    assert grown == pytest.approx({name: float(scale[0].detach().exp()) for name, scale in changes.scales.items()})


def _descent(steps: int) -> Descent:
    """One that learns a constant, whose derivative is -1 at each of `steps` steps."""
    changes = _one_constant()
    constant = changes.constants["a"]

    def back(*_: object) -> None:
        constant.grad = -torch.ones(1)

    decoder = SimpleNamespace(changes=changes, states=lambda sample: [torch.zeros(1, 1, 1)], back=back)
    objective = SimpleNamespace(derivatives=lambda last, target: (0.0, torch.zeros(1, 1)))
    chosen = Chosen(list(range(steps)), [steps], steps)
    read = cast(Any, lambda index: (None, None))
    return Descent(cast(LearningDecoder, decoder), cast(Objective, objective), chosen, read, 0, EXTENT)


def test_some_samples_are_learned_from_once_more() -> None:
    chosen = Chosen(list(range(1, 17)), [0], 20)
    decoder = cast(LearningDecoder, SimpleNamespace(changes=_one_constant()))
    made = Descent(decoder, cast(Objective, None), chosen, lambda index: pytest.fail("no sample"), 0, EXTENT)
    assert sorted(made.order[:16]) == chosen.learned and len(set(made.order[16:])) == 4 and made.updates == 20


def test_the_mean_is_that_of_the_later_half_of_the_steps_also_after_a_restart() -> None:
    made, values = _descent(12), []
    for index in range(12):
        made.update(index)
        values.append(float(made.learned()["constant a"]))
        if index == 7:
            state = made.state()
    assert values == sorted(values) and values[0] > 0
    again = _descent(12)
    again.restore(state)
    for index in range(8, 12):
        again.update(index)
    for each in (made, again):
        each.take_mean()
        # The mean of six numbers is summed in another order.
        assert float(each.learned()["constant a"]) == pytest.approx(sum(values[6:]) / 6, rel=1e-6)


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    made, constant = _descent(4), None
    made.update(0)
    constant = made.learned()["constant a"]
    back = made.decoder.back

    def broken(*arguments: Any) -> None:
        back(*arguments)
        made.leaves["constant a"].grad.fill_(float("nan"))

    made.decoder.back = broken
    made.update(1)
    assert torch.equal(made.learned()["constant a"], constant)
    made.decoder.back = back
    made.update(2)
    assert float(made.learned()["constant a"]) > float(constant)


@pytest.mark.parametrize("size", [2.0**-30, 3e-7, 0.0, 5.0])
def test_derivatives_are_carried_back_at_a_size_that_float16_holds(size: float) -> None:
    made, given = _descent(4), []
    constant = made.decoder.changes.constants["a"]

    def back(sample: object, states: object, by_last: torch.Tensor) -> None:
        given.append(float(by_last.abs().max()))
        constant.grad = by_last.sum().reshape(1)

    made.decoder.back = back
    made.objective = cast(Objective, SimpleNamespace(derivatives=lambda *_: (0.0, torch.full((1, 1), size))))
    made.update(0)
    assert given[0] == 0 if not size else 1 <= given[0] < 2
    assert constant.grad is not None and float(constant.grad) == torch.tensor(size), "to the bit"


def test_the_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[49] == 1.0 and factors[75] == pytest.approx(0.5) and 0 < factors[99] < 0.03
