"""Which samples learn and judge, by the effort."""

import pytest

from calibration.learn.extent import EXTENTS, LEAST_TOKENS, LONGEST, choose_samples
from calibration.quantize.held_out import SAMPLES_PER_HELD

EFFORTS = pytest.mark.parametrize("effort", sorted(EXTENTS))


def test_every_effort_that_learns_holds_samples_out_to_judge() -> None:
    assert EXTENTS.keys() == SAMPLES_PER_HELD.keys()


@pytest.mark.parametrize(("effort", "judging"), [("default", [7, 15]), ("best", [3, 7, 11, 15])])
def test_the_last_of_every_few_samples_judges_and_the_others_learn(effort: str, judging: list[int]) -> None:
    chosen = choose_samples([512] * 16, effort)
    assert chosen is not None
    assert chosen.judging == judging and chosen.learned == [i for i in range(16) if i not in judging]


@EFFORTS
def test_too_few_samples_learn_nothing(effort: str) -> None:
    every = SAMPLES_PER_HELD[effort]
    # No sample judges, too few tokens, and too few in samples that are short enough.
    for lengths in ([2048] * (every - 1), [LEAST_TOKENS // every] * every, [LONGEST + 1] * (2 * every - 1) + [512]):
        assert choose_samples(lengths, effort) is None


@EFFORTS
def test_long_samples_are_left_out_and_many_are_thinned_evenly(effort: str) -> None:
    chosen = choose_samples([LONGEST + 1, *[1024] * 256], effort)
    extent = EXTENTS[effort]
    assert chosen is not None and 0 not in chosen.learned
    assert len(chosen.learned) == extent.tokens // 1024 and len(chosen.judging) == extent.judged_tokens // 1024
    gaps = [after - before for before, after in zip(chosen.learned, chosen.learned[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 3


@EFFORTS
def test_few_samples_teach_several_times(effort: str) -> None:
    extent = EXTENTS[effort]
    found = [choose_samples([tokens] * 16, effort) for tokens in (extent.tokens // 2**6, extent.tokens // 2**4)]
    assert [chosen.rounds for chosen in found if chosen is not None] == [extent.rounds, 1]
