"""Samples that are held out of fits, and the choice that they make."""

import pytest
import torch

from calibration.data.token_choice import choose_tokens
from calibration.learn.extent import LEAST_TOKENS, choose_samples
from calibration.quantize.held_out import HOLDING_EFFORTS, SAMPLES_PER_HELD, tokens_of_held_samples

TEXT, AUDIO = 0, 3


def tokens_of(samples: int, audio: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
    """Five tokens a sample; those of the samples `audio` are sound."""
    rows = [torch.full((5,), AUDIO if place in audio else TEXT, dtype=torch.int32) for place in range(samples)]
    return choose_tokens(rows, 1000, 1.0, 0)


def samples_of(held: torch.Tensor) -> list[int]:
    return held.view(-1, 5).all(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("effort", HOLDING_EFFORTS)
def test_the_last_of_every_few_samples_is_held_out(effort: str) -> None:
    held = tokens_of_held_samples(tokens_of(50), effort)
    assert held is not None and samples_of(held) == [7, 15, 23, 31, 39, 47] and int(held.sum()) == 5 * 6


@pytest.mark.parametrize("effort", HOLDING_EFFORTS)
def test_too_few_samples_hold_none_out(effort: str) -> None:
    assert tokens_of_held_samples(tokens_of(SAMPLES_PER_HELD - 1), effort) is None
    assert tokens_of_held_samples(tokens_of(SAMPLES_PER_HELD), effort) is not None


def test_effort_fast_holds_none_out() -> None:
    assert tokens_of_held_samples(tokens_of(50), "fast") is None


@pytest.mark.parametrize("effort", HOLDING_EFFORTS)
@pytest.mark.parametrize("count", [8, 16, 63])
def test_the_samples_that_judge_learning_are_those_that_are_held_out(effort: str, count: int) -> None:
    held = tokens_of_held_samples(tokens_of(count), effort)
    chosen = choose_samples([LEAST_TOKENS] * count, effort)
    assert held is not None and chosen is not None and set(chosen.judging) <= set(samples_of(held))
    assert not set(chosen.learned) & set(samples_of(held))


def test_a_modality_of_held_out_samples_alone_is_not_held_out() -> None:
    assert tokens_of_held_samples(tokens_of(8, audio=(7,)), "default") is None
    some = tokens_of_held_samples(tokens_of(16, audio=(7,)), "default")
    assert some is not None and samples_of(some) == [15]
    both = tokens_of_held_samples(tokens_of(16, audio=(3, 7)), "default")
    assert both is not None and samples_of(both) == [7, 15]
