import math

import pytest

from benchmarks.accuracy.reporting import scores


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert scores.perplexity([5 * math.log(8), 7 * math.log(8)], 12) == pytest.approx(8)
    assert scores.perplexity([1e6], 1) == math.inf


def test_log_ratio_is_that_of_the_perplexities() -> None:
    ours, theirs = [10.0, 14.0], [9.0, 11.0]
    mean, error = scores.log_ratio(ours, theirs, 8)
    assert mean == pytest.approx(math.log(scores.perplexity(ours, 8) / scores.perplexity(theirs, 8)))
    # Windows differ by 1/4 and 3/4 per token: deviation sqrt(1/8), over the root of two windows.
    assert error == pytest.approx(0.25)


def test_accuracy_and_its_paired_difference() -> None:
    assert scores.accuracy([1, 1, 1, 0]) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 4)))
    right = [1] * 90 + [0] * 10
    assert scores.paired_difference(right, right) == (0.0, 0.0)
    worse = [0] * 5 + [1] * 85 + [0] * 10
    difference, error = scores.paired_difference(worse, right)
    assert difference == pytest.approx(-0.05)
    # Only the 5 that differ make the error, not the 90 or 85 that are right.
    assert error == pytest.approx(math.sqrt(0.05 * 0.95 / 99))


def test_an_interval_is_students() -> None:
    # Of four values with mean 2 and error 0.5; the quantile of 3 degrees of freedom is 3.1824.
    low, high = scores.interval(2.0, 0.5, 4)
    assert (low, high) == pytest.approx((2 - 0.5 * 3.18245, 2 + 0.5 * 3.18245), rel=1e-5)


def test_activation_bits() -> None:
    counts = scores.merge_counts([{"a": [1, 100], "b": [0, 100]}, {"a": [9, 100]}])
    assert counts == {"a": [10, 200], "b": [0, 100]}
    escape, bypass = scores.activation_bits(counts, "escape"), scores.activation_bits(counts, "bypass")
    assert escape["rate"] == pytest.approx(10 / 300) and escape["worst_layer"] == "a" and escape["worst_rate"] == 0.05
    assert escape["bits"] == pytest.approx(4 + 4 * 10 / 300)
    assert bypass["bits"] == pytest.approx(4 + 12 * 10 / 300)
