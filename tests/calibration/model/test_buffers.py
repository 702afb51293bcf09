"""Buffers that no weight file holds are those that transformers computes."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from calibration.model.buffers import compute_buffers

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 64, "rotary_dim": 4}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        ("GPTJForCausalLM", SIZES),
        # A mask of one block is global, that of the other local.
        ("GPTNeoForCausalLM", {**NEO, "window_size": 8, "max_position_embeddings": 64, "vocab_size": 64}),
    ],
)
def test_computed_buffers_are_those_of_a_built_model(model_class: str, settings: dict[str, Any]) -> None:
    cls = getattr(transformers, model_class)
    config = cls.config_class(**settings)
    with torch.device("meta"):
        empty = cls._from_config(config)
    built = cls._from_config(config)
    compared = 0
    for block, whole in zip(empty.transformer.h, built.transformer.h, strict=True):
        assert compute_buffers(empty, block) == []
        for name, expected in whole.named_buffers():
            assert torch.equal(block.get_buffer(name), expected)
            compared += 1
    assert compared >= 2
    assert all(parameter.is_meta for parameter in empty.parameters())


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0, device="meta"), persistent=False)
        self.register_buffer("kept", torch.arange(4.0, device="meta"))


def test_a_buffer_that_transformers_does_not_compute_is_named() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64)
        )
    block = nn.Sequential(_Table())
    assert compute_buffers(model, block) == ["0.table"]
    assert block[0].kept.is_meta
