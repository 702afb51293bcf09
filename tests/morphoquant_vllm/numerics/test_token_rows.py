"""The row of a token: its modality's, or the last one if its values make it a massive token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record, token_rows


def random_record(in_features: int, rows: int, channel: Tensor, low: Tensor, high: Tensor) -> ActivationRecord:
    """A record in another order than x: intervals name channels of x all the same."""
    return activation_record(
        step=torch.ones(in_features),
        channel_order=torch.arange(in_features).flip(0).int(),
        mask=torch.zeros(rows, in_features, dtype=torch.bool),
        centre=torch.zeros(rows, in_features),
        gain=torch.ones(rows),
        massive_channel=channel,
        massive_low=low,
        massive_high=high,
    )


def massive_record(channel: list[list[int]], low: list[list[float]], high: list[list[float]]) -> ActivationRecord:
    """Three rows over eight channels; the last row is the massive one."""
    return random_record(8, 3, torch.tensor(channel, dtype=torch.int32), torch.tensor(low), torch.tensor(high))


def rows_of(x: Tensor, record: ActivationRecord, modality: int = 1) -> list[int]:
    return token_rows(x, torch.full(x.shape[:1], modality, dtype=torch.int32), record).tolist()


def test_a_token_is_massive_within_every_interval_edges_included() -> None:
    record = massive_record([[2, 5]], [[10.0, -3.0]], [[20.0, -1.0]])
    x = torch.zeros(7, 8)
    x[:, 2] = torch.tensor([15.0, 10.0, 20.0, 15.0, 20.0 + 1e-5, 0.0, 15.0])
    x[:, 5] = torch.tensor([-2.0, -1.0, -3.0, 0.0, -2.0, -2.0, -3.0 - 1e-6])
    assert rows_of(x, record) == [2, 2, 2, 1, 1, 1, 1]
    assert rows_of(x, record, modality=0) == [2, 2, 2, 0, 0, 0, 0], "the massive row whatever the modality"


def test_any_set_of_intervals_suffices() -> None:
    record = massive_record([[0, 1], [4, 5]], [[1.0, 1.0], [1.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]])
    x = torch.zeros(5, 8)
    x[0, [0, 1]] = 5.0
    x[1, [4, 5]] = 5.0
    x[2] = 5.0
    x[3, [0, 5]] = 5.0  # half of either set
    assert rows_of(x, record) == [2, 2, 2, 1, 1]


def test_nothing_but_a_number_within_makes_a_token_massive() -> None:
    largest = torch.finfo(torch.float32).max
    record = massive_record([[3, 6]], [[5.0, -largest]], [[largest, largest]])
    x = torch.full((5, 8), 7.0)
    x[1, 3], x[2, 6], x[3, 3], x[4, 0] = torch.nan, torch.nan, torch.inf, torch.nan
    assert rows_of(x, record) == [2, 1, 1, 1, 2], "NaN and infinities elsewhere do not matter"


def test_an_interval_that_is_empty_holds_no_token() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.cat((torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 8)))
    assert set(rows_of(x, massive_record([[0, 1]], [[largest] * 2], [[-largest] * 2]))) == {1}
    assert set(rows_of(x, massive_record([[0, 1]], [[1.0, -9.0]], [[-1.0, 9.0]]))) == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_compared_as_float32(dtype: torch.dtype) -> None:
    # An edge between two neighbours of the 16-bit type: rounded to that type, it would let the lower one in.
    lower, upper = torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps])
    edge = float(lower + (upper - lower) / 4)
    record = massive_record([[0]], [[edge]], [[2.0]])
    x = torch.zeros(2, 8, dtype=dtype)
    x[:, 0] = torch.stack((lower, upper)).to(dtype)
    assert rows_of(x, record) == [1, 2]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), blocks=st.integers(1, 3), intervals=st.integers(1, 4))
def test_rows_follow_the_definition(seed: int, blocks: int, intervals: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(blocks, intervals, generator=generator) - 1
    channel = torch.randint(16, (blocks, intervals), generator=generator, dtype=torch.int32)
    record = random_record(16, 4, channel, low, low + 2)
    x = torch.randn(40, 16, generator=generator)
    modality = torch.randint(4, (40,), generator=generator, dtype=torch.int32)
    sets = [list(zip(*(field[b].tolist() for field in record[5:]), strict=True)) for b in range(blocks)]
    expected = [
        3 if any(all(bottom <= value[channel] <= top for channel, bottom, top in each) for each in sets) else row
        for value, row in zip(x.tolist(), modality.tolist(), strict=True)
    ]
    rows = token_rows(x, modality, record)
    assert rows.dtype == torch.int32
    assert rows.tolist() == expected
