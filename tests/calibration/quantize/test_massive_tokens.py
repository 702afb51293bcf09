"""Which tokens are massive, and intervals that know them by their values."""

import pytest
import torch
from torch import Tensor

from calibration.quantize.massive_tokens import (
    MAX_FALSE_SHARE,
    MIN_TOKENS,
    find_intervals,
    holds,
    no_intervals,
    outlying_tokens,
)
from morphoquant_vllm.format.layers import MASSIVE_CHANNELS
from morphoquant_vllm.format.values import check_massive_channels
from morphoquant_vllm.numerics.activation import is_massive

K, TOKENS, MASSIVE = 32, 600, 12


def planted(channels: tuple[int, ...], size: float = 40.0) -> tuple[Tensor, Tensor]:
    """x [T, K] in which some tokens are large and nearly alike on some channels, and which those are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, K, generator=generator)
    massive = torch.zeros(TOKENS, dtype=torch.bool)
    massive[:: TOKENS // MASSIVE] = True
    noise = torch.randn(int(massive.sum()), len(channels), generator=generator)
    x[massive.nonzero(), torch.tensor(channels)] = size + noise
    return x, massive


# --- outlying_tokens


def test_candidates_stand_out_of_their_own_modality() -> None:
    norms = torch.ones(400)
    modality = torch.zeros(400, dtype=torch.int32)
    modality[200:] = 3
    norms[200:] = 50.0  # loud, but as loud as its like
    norms[[0, 1]], norms[300] = 60.0, 500.0
    assert outlying_tokens(norms, modality).nonzero().flatten().tolist() == [0, 1, 300]
    norms[300] = 60.0  # would stand out of the text alone
    assert outlying_tokens(norms, modality).nonzero().flatten().tolist() == [0, 1]


def test_many_outlying_tokens_are_no_exception() -> None:
    norms, modality = torch.ones(100), torch.zeros(100, dtype=torch.int32)
    norms[:10] = 100.0
    assert int(outlying_tokens(norms, modality).sum()) == 10
    norms[:11] = 100.0
    assert not bool(outlying_tokens(norms, modality).any())


def test_one_modality_with_many_outliers_does_not_hide_anothers() -> None:
    norms, modality = torch.ones(200), torch.zeros(200, dtype=torch.int32)
    modality[100:] = 1
    norms[:15], norms[150] = 100.0, 100.0
    assert outlying_tokens(norms, modality).nonzero().flatten().tolist() == [150]


# --- intervals


@pytest.mark.parametrize("channels", [(5,), (3, 17), (0, 1, 2, 31)])
def test_planted_tokens_are_told_apart(channels: tuple[int, ...]) -> None:
    x, massive = planted(channels)
    intervals = find_intervals(x, massive, blocks=1)
    assert torch.equal(holds(x, intervals), massive)
    assert int(intervals.channel[0, 0]) in channels
    assert (intervals.channel.dtype, intervals.low.dtype) == (torch.int32, torch.float32)
    assert all(field.shape == (1, MASSIVE_CHANNELS) for field in intervals)
    assert all(bool(field.isfinite().all()) for field in intervals), "the format stores finite numbers"
    assert torch.equal(holds(x, intervals), is_massive(x, *intervals))


def test_there_is_room_for_values_that_were_not_seen() -> None:
    """Above, where no other token lies, without end; below, half of the way to the nearest other token."""
    x, massive = planted((5,))
    x[~massive, 5] = 0.0
    x[massive, 5] = torch.linspace(40, 42, int(massive.sum()))
    intervals = find_intervals(x, massive, blocks=1)
    probes = torch.zeros(4, K)
    probes[:, 5] = torch.tensor([4000.0, 21.0, 19.0, 0.0])
    assert holds(probes, intervals).tolist() == [True, True, False, False]


def test_negative_values_open_downwards() -> None:
    x, massive = planted((5,), size=-40.0)
    intervals = find_intervals(x, massive, blocks=1)
    probes = torch.zeros(2, K)
    probes[:, 5] = torch.tensor([-4000.0, 4000.0])
    assert holds(probes, intervals).tolist() == [True, False]


def test_two_channels_tell_what_neither_does_alone() -> None:
    """Massive tokens are high on channels 1 and 2; of the others many are high on either, and none on both."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, K, generator=generator)
    massive = torch.zeros(TOKENS, dtype=torch.bool)
    massive[:MASSIVE] = True
    x[:MASSIVE, 1:3] = 10 + torch.randn(MASSIVE, 2, generator=generator)
    x[MASSIVE:, 1:3] = 0
    x[100:200, 1] = 10 + torch.randn(100, generator=generator)
    x[200:300, 2] = 10 + torch.randn(100, generator=generator)
    intervals = find_intervals(x, massive, blocks=1)
    assert torch.equal(holds(x, intervals), massive)
    assert set(intervals.channel[0, :2].tolist()) == {1, 2}


def test_values_that_overlap_hold_no_token() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5000, K, generator=generator)
    massive = torch.zeros(5000, dtype=torch.bool)
    massive[::50] = True
    intervals = find_intervals(x, massive, blocks=1)
    assert not bool(holds(x, intervals).any())
    probes = torch.cat((x, 100 * x, torch.zeros(1, K)))
    assert not bool(holds(probes, intervals).any())


def test_few_other_tokens_may_be_held() -> None:
    """One of 5000 others looks just like a massive one: within the allowed share, it goes with them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5000, K, generator=generator)
    massive = torch.zeros(5000, dtype=torch.bool)
    massive[:20] = True
    x[:21, 5] = 40 + torch.randn(21, generator=generator) * 0.1
    x[20, 5] = 40.0
    held = holds(x, find_intervals(x, massive, blocks=1))
    assert bool(held[:20].all())
    assert int(held[20:].sum()) == 1 <= MAX_FALSE_SHARE * 5000
    x[20:40] = x[0]  # twenty are too many
    assert not bool(holds(x, find_intervals(x, massive, blocks=1)).any())


def test_each_block_looks_at_its_own_channels() -> None:
    x, massive = planted((2, 20))
    intervals = find_intervals(x, massive, blocks=4)
    check_massive_channels("layer", intervals.channel, K)
    for block, tells in enumerate((True, False, True, False)):
        alone = type(intervals)(*(field[block : block + 1] for field in intervals))
        assert torch.equal(holds(x, alone), massive & tells)
    # What lies outside a block does not change its intervals.
    shuffled = x.clone()
    shuffled[:, 8:] = x[:, 8:].flip(0)
    again = find_intervals(shuffled, massive, blocks=4)
    for before, after in zip(intervals, again, strict=True):
        assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("count", [0, MIN_TOKENS - 1, TOKENS])
def test_too_few_or_all_tokens_teach_nothing(count: int) -> None:
    x, _ = planted((5,))
    massive = torch.arange(TOKENS) < count
    x[massive, 5] = 40.0
    assert not bool(holds(x, find_intervals(x, massive, blocks=2)).any())


@pytest.mark.parametrize("blocks", [1, 4])
def test_no_intervals_are_legal_and_hold_nothing(blocks: int) -> None:
    intervals = no_intervals(K, blocks)
    check_massive_channels("layer", intervals.channel, K)
    assert all(bool(field.isfinite().all()) for field in intervals)
    extreme = torch.tensor([0.0, torch.finfo(torch.float32).max, -torch.inf, torch.inf, torch.nan])
    assert not bool(holds(extreme[:, None].expand(5, K), intervals).any())


@pytest.mark.parametrize("blocks", [1, 2])
def test_intervals_do_not_depend_on_how_many_channels_are_looked_at_together(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=generator)
    massive = torch.arange(500) % 50 == 0
    x[massive, 3] += 5
    x[massive, 17] -= 4
    found = find_intervals(x, massive, blocks)
    assert bool((found.low <= found.high).all()), "or nothing would be told apart"
    monkeypatch.setattr("calibration.quantize.massive_tokens.CHANNELS", 5)
    for ours, theirs in zip(find_intervals(x, massive, blocks), found, strict=True):
        assert torch.equal(ours, theirs)
