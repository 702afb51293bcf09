import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.data.token_choice import choose_tokens, modality_shares, water_fill
from calibration.processes import Processes
from calibration.quantize.held_out import HOLDING_EFFORTS, SAMPLES_PER_HELD, tokens_of_held_samples
from morphoquant_vllm.errors import MorphoQuantError


def test_small_modalities_are_taken_whole() -> None:
    assert water_fill({0: 1000, 1: 10, 2: 500}, 210) == {0: 100, 1: 10, 2: 100}
    assert water_fill({0: 5, 1: 3}, 100) == {0: 5, 1: 3}


@given(st.dictionaries(st.integers(0, 5), st.integers(1, 1000), min_size=1), st.integers(6, 3000))
def test_water_filling_uses_the_budget_and_favours_nobody(counts: dict[int, int], budget: int) -> None:
    quota = water_fill(counts, budget)
    assert sum(quota.values()) == min(budget, sum(counts.values()))
    full = [row for row in counts if quota[row] == counts[row]]
    cut = [quota[row] for row in counts if row not in full]
    # Whoever was cut got as much as anyone else, but for the odd token.
    assert max(cut, default=0) - min(cut, default=0) <= 1
    assert all(quota[row] <= min(cut) + 1 for row in full) if cut else True


def test_shares_follow_the_balance() -> None:
    counts = {0: 900, 1: 100}
    assert modality_shares(counts, 1.0) == {0: 0.5, 1: 0.5}
    assert modality_shares(counts, 0.0) == {0: 0.9, 1: 0.1}
    assert modality_shares(counts, 0.5) == {0: 0.75, 1: 0.25}


def test_a_choice_of_tokens() -> None:
    first = torch.tensor([0] * 50 + [2] * 4 + [0] * 46, dtype=torch.int32)
    second = torch.tensor([0] * 30 + [3] * 70, dtype=torch.int32)
    tokens = choose_tokens([first, second], budget=44, balance=1.0, seed=1)
    assert tokens.counts == {0: 126, 2: 4, 3: 70}
    # The chosen modalities are those of the chosen positions, sample after sample.
    parts = [ids[positions] for ids, positions in zip((first, second), tokens.positions, strict=True)]
    assert torch.equal(torch.cat(parts), tokens.modality)
    drawn = [int((tokens.modality == row).sum()) for row in (0, 2, 3)]
    # Two samples start with a text token; each of these tokens may be added to those drawn.
    assert drawn[1:] == [4, 20] and 20 <= drawn[0] <= 22
    for row in (0, 2, 3):
        assert float(tokens.weight[tokens.modality == row].sum()) == pytest.approx(1 / 3, rel=1e-6)  # float32 sum
    for positions in tokens.positions:
        assert torch.equal(positions, positions.unique())


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    st.integers(1, 60),
    st.integers(0, 5),
)
def test_the_first_token_of_every_sample_is_always_chosen(lengths: list[int], budget: int, seed: int) -> None:
    ids = [torch.arange(length, dtype=torch.int32) // 7 for length in lengths]
    tokens = choose_tokens(ids, budget, 1.0, seed)
    for length, positions in zip(lengths, tokens.positions, strict=True):
        assert positions.numel() == 0 if length == 0 else int(positions[0]) == 0
    rows = len({int(row) for part in ids for row in part})
    chosen = tokens.modality.numel()
    assert min(sum(lengths), budget) <= chosen <= max(budget, rows) + len(lengths)
    assert float(tokens.weight.sum()) == pytest.approx(1, rel=1e-5)  # float32 sum
    for row in tokens.counts:
        assert float(tokens.weight[tokens.modality == row].sum()) == pytest.approx(1 / rows, rel=1e-5)
        assert tokens.weight[tokens.modality == row].unique().numel() == 1, "the added tokens have no larger weight"


def test_samples_are_drawn_whole_but_for_one() -> None:
    tokens = choose_tokens([torch.zeros(50, dtype=torch.int32)] * 100, budget=1010, balance=1.0, seed=3)
    counts = sorted(positions.numel() for positions in tokens.positions)
    # 20 whole samples and a part of another one; of all others the first token.
    assert counts[-20:] == [50] * 20 and counts[:79] == [1] * 79 and counts[79] in (10, 11)


def test_a_modality_of_long_samples_is_drawn_from_many() -> None:
    """Text comes from 16 of 20 long samples, a limited number from each, and sound whole from some of the others."""
    ids = [torch.zeros(1000, dtype=torch.int32)] * 20 + [torch.full((10,), 3, dtype=torch.int32)] * 100
    tokens = choose_tokens(ids, budget=640, balance=1.0, seed=0)
    text, sound = ([positions.numel() for positions in part] for part in (tokens.positions[:20], tokens.positions[20:]))
    assert sorted(text)[:4] == [1] * 4 and all(20 <= count <= 21 for count in sorted(text)[4:])
    assert sorted(sound)[-32:] == [10] * 32 and sorted(sound)[:68] == [1] * 68


@given(st.sampled_from(HOLDING_EFFORTS), st.sampled_from([30, 1000]), st.integers(0, 2**31))
def test_a_share_of_the_drawn_tokens_can_be_held_out(effort: str, length: int, seed: int) -> None:
    """Each sample is drawn as a whole, or gives as many tokens as the others. So the share is nearly exact."""
    tokens = choose_tokens([torch.zeros(length, dtype=torch.int32)] * 64, budget=960, balance=1.0, seed=seed)
    held = tokens_of_held_samples(tokens, effort)
    assert held is not None
    assert float(held.float().mean()) == pytest.approx(1 / SAMPLES_PER_HELD, rel=0.05)


def test_the_limit_of_a_sample_rises_if_all_are_too_few() -> None:
    tokens = choose_tokens([torch.zeros(n, dtype=torch.int32) for n in (300, 20)], budget=160, balance=1.0, seed=0)
    assert [positions.numel() for positions in tokens.positions] in ([140, 20], [141, 20])


def test_without_balance_every_token_counts_the_same_in_the_mean() -> None:
    ids = torch.tensor([0] * 90 + [1] * 10)
    tokens = choose_tokens([ids], budget=20, balance=0.0, seed=0)
    assert float(tokens.weight[tokens.modality == 1].sum()) == pytest.approx(0.1, rel=1e-6)  # float32 sum


def test_the_seed_decides() -> None:
    ids = [torch.zeros(100, dtype=torch.int32)]
    same = [choose_tokens(ids, 20, 1.0, 7).positions[0] for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], choose_tokens(ids, 20, 1.0, 8).positions[0])


def test_no_tokens_are_refused() -> None:
    with pytest.raises(MorphoQuantError, match="no tokens"):
        choose_tokens([torch.empty(0, dtype=torch.int32)], 16, 1.0, 0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 2**16))
def test_a_part_of_the_tokens_keeps_their_places_and_ranks(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, *lengths]
    modalities = [torch.randint(0, 2, (length,), generator=generator) for length in lengths]
    tokens = choose_tokens(modalities, 100, 1.0, 0).spread(Rank(), [index % 2 for index in range(len(lengths))])
    flat = [(sample, position) for sample, chosen in enumerate(tokens.positions) for position in chosen.tolist()]
    chosen = (torch.rand(len(flat), generator=generator) < 0.5).nonzero().flatten()
    part = tokens.part(chosen, torch.ones(chosen.numel()), {0: 1})
    kept = [(sample, position) for sample, places in enumerate(part.positions) for position in places.tolist()]
    assert kept == [flat[index] for index in chosen.tolist()]
    assert torch.equal(part.modality, tokens.modality[chosen])
    values = torch.arange(len(flat))
    # The values of rank 1's tokens of the part, among all of rank 1's values.
    mine = tokens.local(values)[tokens.local_places(chosen)]
    assert torch.equal(mine, part.local(values[chosen]))


class Rank(Processes):
    """The second of two processes; nothing is exchanged."""

    rank, size = 1, 2
