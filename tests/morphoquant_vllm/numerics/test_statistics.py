"""Statistics: merging equals the statistics of the union, in any split."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant_vllm.numerics.statistics import REDUCTIONS, ChannelStatistics


def assert_same(ours: ChannelStatistics, other: ChannelStatistics) -> None:
    for field, reduction in REDUCTIONS.items():
        # Sums of at most 40 float32 values in another order: 40 roundings of 2^-24 of the summed magnitude.
        tolerance = 40 * 2.0**-24 * other.abs_sum.max().clamp(min=other.square_sum.max()) if reduction == "SUM" else 0.0
        assert ((getattr(ours, field).double() - getattr(other, field).double()).abs() <= tolerance).all(), field


def test_against_plain_python() -> None:
    x = torch.tensor([[1.0, -4.0], [3.0, 2.0], [-2.0, 0.0]])
    statistics = ChannelStatistics.of(x)
    assert statistics.minimum.tolist() == [-2.0, -4.0]
    assert statistics.maximum.tolist() == [3.0, 2.0]
    assert statistics.abs_sum.tolist() == [6.0, 6.0]
    assert statistics.sum.tolist() == [2.0, -2.0]
    assert statistics.square_sum.tolist() == [14.0, 20.0]
    assert statistics.abs_mean.tolist() == [2.0, 2.0]
    assert statistics.tokens == 3


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 1000))
def test_merge_of_any_split_is_the_statistics_of_the_union(cuts: list[int], seed: int) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [1e-3, 1.0, 5.0, 30.0, 1.0, 0.0]
    )
    edges = [0, *sorted(cuts), 40]
    merged = ChannelStatistics.empty(6)
    for start, stop in pairwise(edges):
        merged = merged.merge(ChannelStatistics.of(x[start:stop]))
    assert_same(merged, ChannelStatistics.of(x))
    assert merged.tokens == 40


def test_empty_is_neutral_on_both_sides() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    statistics = ChannelStatistics.of(x)
    assert_same(statistics.merge(ChannelStatistics.empty(3)), statistics)
    assert_same(ChannelStatistics.empty(3).merge(statistics), statistics)


def test_no_token() -> None:
    statistics = ChannelStatistics.of(torch.empty(0, 3))
    assert statistics.tokens == 0
    assert statistics.abs_mean.tolist() == [0.0, 0.0, 0.0]
    assert (statistics.minimum == torch.inf).all()
    assert (statistics.maximum == -torch.inf).all()


def test_half_precision_input_is_summed_in_float32() -> None:
    x = torch.full((3000, 1), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    assert ChannelStatistics.of(x).sum.item() == 3000.0


def test_wrong_rank() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 4\]"):
        ChannelStatistics.of(torch.zeros(2, 3, 4))
