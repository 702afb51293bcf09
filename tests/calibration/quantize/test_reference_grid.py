"""The reference's grid: whose outliers are masked, and that the search is the reference's."""

from functools import reduce

import pytest
import torch
from torch import Tensor

from calibration.quantize.reference_grid import MIN_MASK_TOKENS, reference_grid
from calibration.settings.recipe import Recipe
from morphoquant_vllm.numerics import activation, reference
from morphoquant_vllm.numerics.statistics import ChannelStatistics

K = 64


def grid_of(*modalities: Tensor, full_mask: bool = False, chunk: int = 100, **settings: object) -> tuple:
    """Mask and grid of modalities' tokens [T, K], all of equal weight."""
    x = torch.cat(modalities)
    weight = torch.full(x.shape[:1], 1 / x.shape[0])
    statistics = [ChannelStatistics.of(part) for part in modalities]
    parts = zip(x.split(chunk), weight.split(chunk), strict=True)
    pooled = reduce(ChannelStatistics.merge, statistics)
    return reference_grid(statistics, pooled, parts, Recipe(grid="reference", **settings), full_mask=full_mask)


def normal(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed))


def text_and_audio() -> tuple[Tensor, Tensor]:
    """Channel 5 is heavy-tailed in text, channel 9 only in the few audio tokens."""
    text, audio = normal(360), normal(40, seed=1)
    text[::40, 5] *= 60
    audio[::10, 9] *= 60
    return text, audio


def test_an_outlier_of_a_rare_modality_is_masked() -> None:
    mask, _ = grid_of(*text_and_audio())
    assert mask.nonzero().flatten().tolist() == [5, 9]
    mask, _ = grid_of(*text_and_audio(), tau=1e9)
    assert not bool(mask.any())


@pytest.mark.parametrize("rare", [1, 2, MIN_MASK_TOKENS - 1])
def test_a_modality_of_a_few_tokens_has_no_mask_of_its_own(rare: int) -> None:
    text, audio = text_and_audio()
    mask, _ = grid_of(text, audio[:rare])
    # The text's heavy tail alone, although some channel always stands out of a few tokens (and every one of one).
    assert mask.nonzero().flatten().tolist() == [5]


def test_modalities_of_a_few_tokens_each_are_masked_together() -> None:
    x = normal(MIN_MASK_TOKENS)
    x[::8, 11] *= 60
    mask, _ = grid_of(x[0::2], x[1::2])
    assert mask.nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("tokens", [1, 100])
def test_inputs_without_spread_mask_nothing(tokens: int) -> None:
    mask, grid = grid_of(normal(1).repeat(tokens, 1))
    assert not bool(mask.any())
    assert bool((grid.step.isfinite() & (grid.step > 0)).all())


def test_full_mask_masks_every_channel() -> None:
    mask, _ = grid_of(*text_and_audio(), full_mask=True)
    assert bool(mask.all())


def test_the_grid_is_the_reference_search_on_one_batch() -> None:
    """One modality in one chunk is the reference's case: its own steps, one after the other."""
    x, _ = text_and_audio()
    mask, grid = grid_of(x, chunk=1000)
    statistics = ChannelStatistics.of(x)
    expected = reference.outlier_mask(reference.dispersion_score(statistics), 2.0)
    assert torch.equal(mask, expected)
    low, high = reference.base_range(statistics.minimum, statistics.maximum, mask)
    ratio = reference.best_ratio(reference.search_scores(x, low, high, mask))
    served = activation.served_grid(ratio * low, ratio * high, statistics.minimum, statistics.maximum, mask)
    # The weighted mean of equal weights may take the neighbour of two ratios with equal scores, to float32.
    same = torch.isclose(grid.step, served.step)
    assert float(same.float().mean()) > 0.9
    assert bool(same[mask].all())


def test_chunks_score_as_the_whole() -> None:
    whole, chunked = (grid_of(*text_and_audio(), chunk=chunk)[1] for chunk in (1000, 37))
    # As above: a tie of two ratios here and there.
    assert float(torch.isclose(whole.step, chunked.step).float().mean()) > 0.9


def test_the_guard_keeps_what_was_seen_from_saturating() -> None:
    x, _ = text_and_audio()
    # The nearer edge is small and the farther one far: the guard has to raise the step.
    x[:, 5] = x[:, 5].abs()
    x[0, 5], x[1, 5] = -0.01, 500.0
    _, grid = grid_of(x)
    assert float(grid.step[5]) == pytest.approx(500 / activation.GUARD_CODES)
    # Unguarded, the step is at most 2 * 0.01 / 15.
    assert float(grid.guard_raise[5]) >= 500 / activation.GUARD_CODES / (0.02 / 15) * (1 - 1e-6)
    assert int((grid.guard_raise > 1).sum()) == 1


def test_a_threshold_for_all_layers_masks_by_dispersion_alone() -> None:
    text, audio = text_and_audio()
    scores = torch.stack([reference.dispersion_score(ChannelStatistics.of(part)) for part in (text, audio)])
    threshold = float(scores.amax(0).sort().values[-7])
    mask, _ = grid_of(text, audio, dispersion_threshold=threshold)
    assert torch.equal(mask, scores.amax(0) >= threshold)
    assert int(mask.sum()) == 7, "tau would mask two"


@pytest.mark.parametrize("cosine_weight", [0.75, 10.0])
def test_the_composite_loss_is_the_references(cosine_weight: float) -> None:
    """One chunk is the reference's batch."""
    x, _ = text_and_audio()
    statistics = ChannelStatistics.of(x)
    mask, grid = grid_of(x, chunk=1000, cosine_weight=cosine_weight)
    low, high = reference.base_range(statistics.minimum, statistics.maximum, mask)
    ratio = reference.best_ratio(reference.search_scores(x, low, high, mask, cosine_weight=cosine_weight))
    expected = activation.served_grid(ratio * low, ratio * high, statistics.minimum, statistics.maximum, mask)
    # The error is a weighted sum here and a mean there: float noise may decide between neighbouring ratios.
    assert float((grid.step == expected.step).float().mean()) > 0.9


def test_the_cosine_decides_if_it_weighs_enough() -> None:
    x, _ = text_and_audio()
    assert not torch.equal(grid_of(x, cosine_weight=10)[1].step, grid_of(x, lp_norm=8)[1].step)
    assert not torch.equal(grid_of(x, lp_norm=8, cosine_weight=10)[1].step, grid_of(x, lp_norm=8)[1].step)


def test_the_cosine_counts_once_however_many_chunks_there_are() -> None:
    x, _ = text_and_audio()
    whole = grid_of(x, chunk=1000, cosine_weight=0.75)[1].step
    parts = grid_of(x, chunk=90, cosine_weight=0.75)[1].step
    # The mean of the chunks' cosines is not that of all tokens, but near it.
    assert float((parts / whole - 1).abs().mean()) < 0.05
