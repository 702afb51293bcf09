"""The authors' algorithm, piece by piece; test_golden.py holds the whole against their own output."""

import math

import pytest
import torch

from morphoquant_vllm.numerics import reference
from morphoquant_vllm.numerics.statistics import ChannelStatistics


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dispersion_score_against_plain_python() -> None:
    x = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    score = reference.dispersion_score(ChannelStatistics.of(x))
    expected = [2.0 / math.log1p(2.0 + 1e-5), 6.0 / math.log1p(3.0 + 1e-5)]
    assert score.tolist() == pytest.approx(expected, rel=1e-6)  # float32 of a float64 figure


def test_outlier_mask_finds_the_long_tail() -> None:
    x = random(500, 32)
    x[7, 3] = 60.0
    mask = reference.outlier_mask(reference.dispersion_score(ChannelStatistics.of(x)))
    assert mask.nonzero().flatten().tolist() == [3]
    assert not reference.outlier_mask(torch.arange(32.0), tau=40.0).any()


def test_outlier_mask_uses_the_unbiased_deviation() -> None:
    # One of five scores is 5: mean 1, deviation 2.236 unbiased (2.0 biased), so the threshold is met at tau <= 1.788.
    scores = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0])
    assert reference.outlier_mask(scores, tau=1.78).tolist() == [False] * 4 + [True]
    assert not reference.outlier_mask(scores, tau=1.9).any()


def test_base_range() -> None:
    minimum = torch.tensor([-1.0, -1.0, 0.5, -3.0, 0.0])
    maximum = torch.tensor([4.0, 4.0, 2.0, -1.0, 6.0])
    mask = torch.tensor([False, True, True, False, True])
    low, high = reference.base_range(minimum, maximum, mask)
    assert low.tolist() == [-4.0, -1.0, 0.5, -3.0, 0.0]
    assert high.tolist() == [4.0, 1.0, 2.0, -1.0, 0.0]


def test_grid_has_sixteen_values_and_half_a_step_of_error() -> None:
    x = torch.linspace(-3, 5, 400)[:, None]
    low, high = torch.tensor([-5.0]), torch.tensor([5.0])
    quantized = reference.fake_quantize(x, low, high)
    step = 1 / reference.inverse_step(low, high)
    assert len(quantized.unique()) <= 16
    # Half a step, except if the range ends between two grid points; 1e-6 for float32 noise of values near 5.
    inside = x.abs() <= 7 * step
    assert ((quantized - x).abs() <= step / 2 + 1e-6)[inside].all()


def test_one_sided_range_spends_every_code_inside() -> None:
    x = torch.linspace(10.0, 13.0, 301)[:, None]
    quantized = reference.fake_quantize(x, torch.tensor([10.0]), torch.tensor([13.0]))
    assert len(quantized.unique()) == 16
    # Half a step for rounding and half for the zero point, which is an integer.
    assert (quantized - x).abs().max() <= 3.0 / 15 + 1e-5


def test_exact_mode_passes_masked_outliers_through_and_nothing_else() -> None:
    x = random(200, 4) * 3
    low, high = torch.full((4,), -2.0), torch.full((4,), 2.0)
    mask = torch.tensor([True, True, False, False])
    output = reference.exact_quantize(x, low, high, mask, lam=0.8)
    bypass = (x.abs() > 1.6) & mask
    assert bypass.any()
    assert torch.equal(output[bypass], x[bypass])
    assert torch.equal(output[~bypass], reference.fake_quantize(x, low, high)[~bypass])


def test_dead_channels_stay_finite() -> None:
    x = torch.zeros(5, 2)
    zeros = torch.zeros(2)
    assert torch.equal(reference.exact_quantize(x, zeros, zeros, torch.tensor([True, False])), x)


def test_search_ratios_run_from_lower_to_one() -> None:
    ratios = reference.search_ratios(0.6)
    assert ratios.shape == (15,)
    assert (ratios.diff() > 0).all()
    assert ratios[0].item() == pytest.approx(0.6)
    assert ratios[-1].item() == 1.0


def test_channel_score_against_plain_python() -> None:
    x, quantized = random(9, 3), random(9, 3, seed=1)
    for power in (2.0, 0.5):
        score = reference.channel_score(x, quantized, power, cosine_weight=0.75)
        for channel in range(3):
            a, b = x[:, channel].tolist(), quantized[:, channel].tolist()
            error = sum(abs(q - v) ** power for v, q in zip(a, b, strict=True)) / 9
            cosine = sum(q * v for v, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            # 9 float32 terms in another order.
            assert score[channel].item() == pytest.approx(-error + 0.75 * cosine, rel=1e-5)


def test_equal_token_weights_are_the_plain_mean() -> None:
    x, quantized = random(16, 5), random(16, 5, seed=1)
    plain = reference.channel_score(x, quantized)
    weighted = reference.channel_score(x, quantized, token_weight=torch.full((16,), 1 / 16))
    assert torch.allclose(plain, weighted, rtol=1e-6)  # 16 float32 terms in another order
    one = torch.zeros(16)
    one[3] = 1.0
    assert torch.equal(reference.channel_score(x, quantized, token_weight=one), -(quantized - x)[3].abs().pow(2))


def test_search_takes_the_best_ratio_and_the_smallest_of_equals() -> None:
    x = random(300, 8)
    x[0, 0] = 40.0  # one value stretches the range of channel 0: a smaller ratio must win there
    minimum, maximum = x.amin(0), x.amax(0)
    mask = torch.zeros(8, dtype=torch.bool)
    low, high = reference.base_range(minimum, maximum, mask)
    scores = reference.search_scores(x, low, high, mask, lp_norm=0.5)
    ratios = reference.search_ratios()
    best = reference.best_ratio(scores)
    for channel in range(8):
        column = scores[:, channel].tolist()
        assert best[channel] == ratios[column.index(max(column))]
    assert best[0] < 1.0
    assert (reference.best_ratio(torch.zeros(15, 2)) == ratios[0]).all()


def test_moving_average_over_batches() -> None:
    one, two = torch.tensor([2.0]), torch.tensor([4.0])
    assert torch.equal(reference.merge_scores(None, one), one)
    assert reference.merge_scores(one, two).item() == 3.0
