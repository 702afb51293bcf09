"""Samples that are held out of fits, and the choice that they make."""

import pytest
import torch

from calibration.data.token_choice import choose_tokens
from calibration.learn.extent import LEAST_TOKENS, choose_samples
from calibration.processes import ONE
from calibration.quantize.held_out import HOLDING_EFFORTS, SAMPLES_PER_HELD, HeldMoments, held_out
from calibration.quantize.moments import Moments

TEXT, AUDIO = 0, 3


def tokens_of(samples: int, audio: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
    """Five tokens a sample; those of the samples `audio` are sound."""
    rows = [torch.full((5,), AUDIO if place in audio else TEXT, dtype=torch.int32) for place in range(samples)]
    return choose_tokens(rows, 1000, 1.0, 0)


def samples_of(held: torch.Tensor) -> list[int]:
    return held.view(-1, 5).all(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("effort", HOLDING_EFFORTS)
def test_the_last_of_every_few_samples_is_held_out(effort: str) -> None:
    held = held_out(tokens_of(50), effort)
    assert held is not None and samples_of(held) == [7, 15, 23, 31, 39, 47] and int(held.sum()) == 5 * 6


@pytest.mark.parametrize("effort", HOLDING_EFFORTS)
def test_too_few_samples_hold_none_out(effort: str) -> None:
    assert held_out(tokens_of(SAMPLES_PER_HELD - 1), effort) is None
    assert held_out(tokens_of(SAMPLES_PER_HELD), effort) is not None


def test_effort_fast_holds_none_out() -> None:
    assert held_out(tokens_of(50), "fast") is None


@pytest.mark.parametrize("effort", HOLDING_EFFORTS)
@pytest.mark.parametrize("count", [8, 16, 63])
def test_the_samples_that_judge_learning_are_those_that_are_held_out(effort: str, count: int) -> None:
    held = held_out(tokens_of(count), effort)
    chosen = choose_samples([LEAST_TOKENS] * count, effort)
    assert held is not None and chosen is not None and set(chosen.judging) <= set(samples_of(held))
    assert not set(chosen.learned) & set(samples_of(held))


def test_a_modality_of_held_out_samples_alone_is_not_held_out() -> None:
    assert held_out(tokens_of(8, audio=(7,)), "default") is None
    some = held_out(tokens_of(16, audio=(7,)), "default")
    assert some is not None and samples_of(some) == [15]
    both = held_out(tokens_of(16, audio=(3, 7)), "default")
    assert both is not None and samples_of(both) == [7, 15]


def judge() -> tuple[HeldMoments, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A judge of 300 tokens of one set, their codes and values [T, K], and the 16-bit weights [N, K]."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (300, 32), generator=generator, dtype=torch.int8)
    values = codes + torch.randn(300, 32, generator=generator)
    matrix = torch.randn(20, 32, generator=generator)
    moments = Moments.zeros(1, matrix)
    even = torch.full((300,), 1 / 300)
    moments.add(codes, torch.ones(300), values, torch.zeros(300, dtype=torch.int64), even)
    moments.add_codes(codes, even)
    moments.mirror()
    return HeldMoments.of(moments, slice(5, 15)), codes.float(), values, matrix[5:15]


def test_the_error_is_that_of_the_outputs_about_their_means() -> None:
    held, codes, values, matrix = judge()
    target = (values @ matrix.T).double()

    def error(weights: torch.Tensor) -> float:
        gap = (codes @ weights.T).double() - target
        return float((gap - gap.mean(0)).square().sum()) / len(codes)

    other = matrix + 0.3 * torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    found = float(held.error(other) - held.error(matrix))
    assert abs(found - (error(other) - error(matrix))) < 1e-4 * error(other)


def test_the_candidate_of_least_error_is_chosen_and_the_first_of_equals() -> None:
    held, _, _, matrix = judge()
    candidates = [(matrix * 2, "far"), (matrix, "near"), (matrix.clone(), "again"), (matrix * 0, "none")]
    assert held.best(candidates, ONE) == "near"
