"""What skipped blocks record: their arguments by name, and what the model adds between them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibration.blocks.capture import ADDED, MemoryInput, skipped_blocks


class _Block(nn.Module):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        raise AssertionError("a skipped block ran")


@pytest.mark.parametrize("tuples", [False, True])
def test_what_is_added_between_blocks_is_recorded_exactly(tuples: bool) -> None:
    blocks = [_Block() for _ in range(3)]
    entry = MemoryInput(torch.zeros(4), torch.arange(4))
    # float32 would lose these features in a difference of sums.
    states, features = torch.full((1, 4, 8), 1e6), torch.full((1, 4, 8), 1e-4)
    with skipped_blocks(blocks, entry, tuple_output=tuples):
        for index, block in enumerate(blocks):
            output = block(states, None, scale=2.0)
            states = output[0] if tuples else output
            if index == 0:
                states = states + features
    assert torch.equal(entry.hidden, torch.full((1, 4, 8), 1e6)) and torch.equal(entry.served, entry.hidden)
    own = {"mask", "scale"}
    assert [arguments.keys() for arguments in entry.arguments] == [own, own | {ADDED}, own]
    assert torch.equal(entry.arguments[1][ADDED], features)
    assert [vars(block).get("forward") for block in blocks] == [None] * 3
