"""Counts of tokens and escapes by row equal a count token by token."""

import torch

from morphoquant_vllm.numerics.escape_counts import COLUMNS, add_escape_counts


def test_counts_are_those_of_each_live_token_and_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-20, 20, (9, 32), generator=generator).to(torch.int8)
    modality = torch.tensor([0, 2, 2, 0, 1, 2, 0, 1, 0, 3, 3], dtype=torch.int32)
    massive = torch.tensor([True, False, True, False, False, False, False, False, True])
    live = 7
    expected = torch.zeros(4, len(COLUMNS), dtype=torch.int64)
    for token in range(live):
        escaped = sum(not -8 <= code <= 7 for code in codes[token].tolist())
        heavy = int(massive[token])
        expected[modality[token]] += torch.tensor([1, escaped, heavy, heavy * escaped])
    assert bool((expected[[0, 2]] > 0).all()), "text has massive tokens"
    counts = torch.zeros_like(expected)
    for _ in range(2):
        add_escape_counts(counts, codes, modality, massive, torch.tensor(live))
    assert torch.equal(counts, 2 * expected)


def test_a_step_without_live_tokens_counts_nothing() -> None:
    counts = torch.zeros(2, len(COLUMNS), dtype=torch.int64)
    codes = torch.full((3, 4), 100, dtype=torch.int8)
    modality, massive = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool)
    add_escape_counts(counts, codes, modality, massive, torch.tensor(0))
    assert not counts.any()
