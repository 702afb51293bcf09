"""Figures of two runs, and codes that noise moves."""

import pytest
import torch

from benchmarks.drift.figures import gaps, moved_codes, ties


def test_gaps_are_of_magnitudes() -> None:
    assert gaps([-1.0, -2.0], [-1.5, -1.0]) == {
        "mean": pytest.approx(0.75),
        "p99": pytest.approx(0.995),
        "largest": pytest.approx(1.0),
    }


def test_a_value_at_a_tie_moves_and_one_in_the_middle_does_not() -> None:
    # In steps of 1: half to even keeps 0.5 at 0, and the next bfloat16 above it is 1.
    x = torch.tensor([0.5, 1.0]).bfloat16()
    assert moved_codes(x, 1.0, 0.0) == 0.5
    assert ties(x, 1.0) == 0.5
    # With limits moved, 0.5 is 1 before and after.
    assert moved_codes(x, 1.0, 0.1) == 0.0


def test_a_value_below_zero_moves_away_from_it() -> None:
    assert moved_codes(torch.tensor([-0.5]).bfloat16(), 1.0, 0.0) == 1.0
