"""The pass of a model without weights: what later blocks read of earlier ones is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibration.model.tracing import run_blocks


class Block(nn.Module):
    """Leaves its keys in a mapping; `read` looks for those of earlier blocks."""

    def __init__(self, read: Callable[[dict[int, Tensor]], Any]) -> None:
        super().__init__()
        self.read = read
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, keys: dict[int, Tensor]) -> Tensor:
        if keys:
            self.read(keys)
        keys[len(keys)] = hidden_states
        return self.linear(hidden_states)


class Model(nn.Module):
    def __init__(self, read: Callable[[dict[int, Tensor]], Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(Block(read) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Tensor:
        hidden, keys = self.embedding(input_ids), dict[int, Tensor]()
        for block in self.blocks:
            hidden = block(hidden, keys=keys)
        return hidden


@pytest.mark.parametrize(
    ("read", "seen"), [(lambda keys: keys[0], True), (lambda keys: keys.get(0), True), (lambda keys: None, False)]
)
def test_what_a_block_reads_of_earlier_ones_is_seen(read: Callable[[dict[int, Tensor]], Any], seen: bool) -> None:
    with torch.device("meta"):
        model = Model(read)
    run = run_blocks(model, list(model.blocks), "blocks")
    assert {name: mapping.was_read for name, mapping in run.left.items()} == {"keys": seen}
    assert [list(inputs) for inputs in run.inputs] == [["linear"], ["linear"]]
