"""Divergence, perplexity and block errors against the same sums written out, on models of two blocks."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from calibration.compare.measure import Group, compare, modalities
from calibration.data.rendering import Sample
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS

VOCABULARY, HIDDEN = 11, 4
IMAGE = DEFAULT_ROWS.index("image")


class Model(nn.Module):
    """An embedding, two linear blocks of which one gives a tuple as some decoders do, and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), Paired()])
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.blocks[0](self.embedding(input_ids))
        return SimpleNamespace(logits=self.head(self.blocks[1](hidden)[0]))


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return self.linear(hidden), None


def sample(ids: list[int], rows: list[int]) -> Sample:
    return Sample({"input_ids": torch.tensor([ids])}, torch.tensor(rows, dtype=torch.int32), "data.jsonl:1")


TEXT_SAMPLE = sample([1, 2, 3, 4], [0, 0, 0, 0])
IMAGE_SAMPLE = sample([5, 6, 7, 8, 9], [0, IMAGE, IMAGE, 0, 0])


def test_the_sums_are_those_of_their_definitions() -> None:
    first, second = Model(0), Model(1)
    result = compare(first, second, "blocks", [TEXT_SAMPLE, IMAGE_SAMPLE])
    assert list(result.groups) == ["all", "text", "image"]
    losses, divergences = [], []
    for entry, places in ((TEXT_SAMPLE, [0, 1, 2]), (IMAGE_SAMPLE, [2, 3])):
        ids = entry.inputs["input_ids"]
        want, have = (model(ids, False).logits[0].softmax(-1).detach() for model in (first, second))
        for place in places:
            losses.append(-math.log(have[place, ids[0, place + 1]]))
            divergences.append(sum(p * math.log(p / q) for p, q in zip(want[place], have[place], strict=True)))
    everything = result.groups["all"].figures()
    assert (everything["samples"], everything["tokens"]) == (2, 5)
    assert everything["second_perplexity"] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert everything["divergence"] == pytest.approx(float(sum(divergences)) / 5, rel=1e-4)
    image = result.groups["image"].figures()
    assert image["second_perplexity"] == pytest.approx(math.exp(sum(losses[3:]) / 2), rel=1e-5)


def test_the_error_of_a_block_is_relative_to_the_first_model() -> None:
    first, second = Model(0), Model(0)
    with torch.no_grad():
        second.blocks[1].linear.weight.mul_(1.1)
        second.blocks[1].linear.bias.mul_(1.1)
    result = compare(first, second, "blocks", [TEXT_SAMPLE])
    assert result.relative_errors() == pytest.approx([0.0, 0.1], abs=1e-6)


def test_a_model_does_not_differ_from_itself() -> None:
    figures = compare(Model(3), Model(3), "blocks", [TEXT_SAMPLE]).groups["all"].figures()
    assert (figures["divergence"], figures["agreement"]) == (0, 1)
    assert figures["first_perplexity"] == figures["second_perplexity"] > 1


def test_a_sample_counts_for_each_of_its_media() -> None:
    rows = [DEFAULT_ROWS.index(name) for name in ("audio", "text", "image")]
    assert modalities(sample([1, 2, 3], rows)) == ["image", "audio"]
    assert modalities(TEXT_SAMPLE) == ["text"]


def test_no_hook_is_left_on_a_model() -> None:
    model = Model(0)
    compare(model, Model(1), "blocks", [TEXT_SAMPLE])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("place", "which"), [(0, "first"), (1, "second")])
def test_logits_that_are_no_numbers_are_refused(place: int, which: str) -> None:
    models = Model(0), Model(1)
    models[place].head.bias.data[3] = math.nan
    with pytest.raises(MorphoQuantError, match=f"data.jsonl:1: the {which} model answers with NaN or infinite logits"):
        compare(*models, "blocks", [TEXT_SAMPLE])


def test_a_loss_beyond_the_largest_perplexity_is_no_overflow() -> None:
    assert math.isfinite(Group(samples=1, tokens=1, first_loss=5000.0).figures()["first_perplexity"])
