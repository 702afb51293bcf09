"""Which samples learn and judge, by the effort."""

import pytest

from calibration.learn.extent import EXTENTS, LEAST_TOKENS, LONGEST, choose_samples
from calibration.quantize.held_out import HOLDING_EFFORTS, SAMPLES_PER_HELD

EFFORTS = pytest.mark.parametrize("effort", sorted(EXTENTS))


def test_every_effort_that_learns_holds_samples_out_to_judge() -> None:
    assert tuple(EXTENTS) == HOLDING_EFFORTS


@EFFORTS
def test_the_last_of_every_few_samples_judges_and_the_others_learn(effort: str) -> None:
    chosen = choose_samples([512] * 16, effort)
    assert chosen is not None
    assert chosen.judging == [7, 15] and chosen.learned == [i for i in range(16) if i not in (7, 15)]


def test_best_makes_three_times_as_many_updates() -> None:
    for tokens in ([512] * 32, [4096] * 256):
        updates = {}
        for effort in EXTENTS:
            chosen = choose_samples(tokens, effort)
            assert chosen is not None
            updates[effort] = chosen.updates
        assert updates["best"] == pytest.approx(3 * updates["default"], rel=0.1)


@EFFORTS
def test_too_few_samples_learn_nothing(effort: str) -> None:
    every = SAMPLES_PER_HELD
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
    # 56 of 64 samples learn.
    most = extent.tokens // 56
    found = [choose_samples([tokens] * 64, effort) for tokens in (most // extent.most_passes, most)]
    assert [chosen.updates for chosen in found if chosen is not None] == [56 * extent.most_passes, 56]


@EFFORTS
@pytest.mark.parametrize("samples", [96, 104, 120])
def test_any_number_of_samples_teaches_about_as_many_tokens(effort: str, samples: int) -> None:
    chosen = choose_samples([512] * samples, effort)
    assert chosen is not None and 512 * chosen.updates == pytest.approx(EXTENTS[effort].tokens, rel=0.01)
