"""Which samples learn and judge, and the rates of the steps."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from calibration.learn.changes import no_changes
from calibration.learn.descent import (
    ESCAPE_POWER,
    LARGEST_RATIO,
    LEAST_TOKENS,
    LONGEST,
    TOKENS,
    Chosen,
    Descent,
    choose_samples,
    rate_factor,
)
from calibration.learn.model import LearningDecoder
from calibration.learn.targets import Objective
from morphoquant_vllm.format.layers import LayerSpec


def test_held_out_samples_judge_and_all_others_learn() -> None:
    held = [index % 16 == 15 for index in range(32)]
    chosen = choose_samples([512] * 32, held)
    assert chosen is not None
    assert chosen.judging == [15, 31] and chosen.learned == [index for index in range(32) if not held[index]]


@pytest.mark.parametrize(
    ("lengths", "held"),
    [
        # No sample judges, too few tokens, and too few in samples that are short enough.
        ([512] * 32, [False] * 32),
        ([LEAST_TOKENS // 4] * 4, [False, False, False, True]),
        ([LONGEST + 1] * 4 + [LONGEST // 2] * 2, [False] * 5 + [True]),
    ],
)
def test_too_few_samples_learn_nothing(lengths: list[int], held: list[bool]) -> None:
    assert choose_samples(lengths, held) is None


def test_long_samples_are_left_out_and_many_are_thinned_evenly() -> None:
    lengths = [LONGEST + 1, *[1024] * 256]
    chosen = choose_samples(lengths, [index % 16 == 15 for index in range(257)])
    assert chosen is not None and 0 not in chosen.learned
    assert len(chosen.learned) == TOKENS // 1024 and len(chosen.judging) == TOKENS // 8 // 1024
    gaps = [after - before for before, after in zip(chosen.learned, chosen.learned[1:], strict=False)]
    assert min(gaps) >= 2 and max(gaps) <= 6


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


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[49] == 1.0 and factors[75] == pytest.approx(0.5) and 0 < factors[99] < 0.03
