"""Errors of experts over the tokens that chose them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.experts.errors import expert_errors
from benchmarks.accuracy.experts.separate import separate
from benchmarks.models import decoder
from tests.tiny_experts import build_tiny_qwen3_moe

FIRST, SECOND = (f"model.layers.{block}.mlp.experts" for block in range(2))
TOKENS = torch.randint(0, 200, (4, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[0, :5] = 0
BATCHES = [{"input_ids": TOKENS[:2], "attention_mask": MASK[:2]}, {"input_ids": TOKENS[2:], "attention_mask": MASK[2:]}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"))


def test_an_expert_that_errs_is_named_and_others_are_exact(source: Path) -> None:
    reference: Any = decoder.load(source)
    model: Any = decoder.load(source)
    with torch.no_grad():
        # Outputs of this expert are 1.25 times as large. Later blocks see other inputs, but are judged on 16-bit ones.
        model.model.layers[0].mlp.experts.down_proj[2] *= 1.25
    found = expert_errors(model, reference, BATCHES)
    assert list(found) == [FIRST, SECOND]
    assert found[FIRST]["error"] == pytest.approx([0, 0, 0.25, 0], abs=1e-5)
    assert found[SECOND]["error"] == pytest.approx([0, 0, 0, 0], abs=1e-5)
    # Two experts a token; padding does not count.
    assert all(sum(figures["tokens"]) == 2 * int(MASK.sum()) for figures in found.values())


def test_separate_experts_are_measured_as_merged_ones_are(source: Path) -> None:
    reference, model = decoder.load(source), decoder.load(source)
    separate(model)
    with torch.no_grad():
        model.get_parameter(f"{SECOND}.1.up_proj.weight").mul_(0.5)
    found = expert_errors(model, reference, BATCHES)
    assert found[FIRST]["error"] == pytest.approx([0, 0, 0, 0], abs=1e-5)
    assert found[SECOND]["error"] == pytest.approx([0, 0.5, 0, 0], abs=1e-5)


def test_an_expert_without_tokens_has_no_error(source: Path) -> None:
    reference = decoder.load(source)
    one = {"input_ids": TOKENS[:1, :1], "attention_mask": MASK[1:2, :1]}
    found = expert_errors(reference, reference, [one])
    assert sorted(found[FIRST]["tokens"]) == [0, 0, 1, 1]
    assert [error is None for error in found[FIRST]["error"]] == [count == 0 for count in found[FIRST]["tokens"]]
