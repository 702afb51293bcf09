"""Which samples learn and judge, and the rates of the steps."""

import pytest

from calibration.learn.descent import LEAST_TOKENS, LONGEST, TOKENS, choose_samples, rate_factor


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


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[49] == 1.0 and factors[75] == pytest.approx(0.5) and 0 < factors[99] < 0.03
