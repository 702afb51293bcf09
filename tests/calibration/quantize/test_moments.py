"""Moments of codes and values, the regression on them, and the bias that makes means equal."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from calibration.quantize.int8_products import has_exact_products
from calibration.quantize.moments import SUMS, Moments, fitting_shrinkage, gather, output_bias, regress
from morphoquant_vllm.numerics.weights import absorb

K, N, TOKENS, SETS = 24, 10, 500, 2


def tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Correlated values [T, K], their codes on random steps, token sets, weights, and the steps."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=generator) / K**0.5
    values = torch.randn(TOKENS, K, generator=generator) @ mixing + torch.randn(K, generator=generator)
    step = values.abs().amax(0) / 4
    token_set = (torch.arange(TOKENS) % 7 == 0).long()
    values = values + 3.0 * token_set[:, None]
    return values, (values / step).round(), token_set, torch.rand(TOKENS, generator=generator) / TOKENS, step


def moments_of(
    codes: Tensor,
    values: Tensor,
    token_set: Tensor,
    weight: Tensor,
    chunk: int = TOKENS,
    matrix: Tensor | None = None,
    gain: Tensor | None = None,
) -> Moments:
    gain = torch.ones(codes.shape[0]) if gain is None else gain
    codes, matrix = codes.to(torch.int8), full_weight() if matrix is None else matrix
    parts = zip(*(field.split(chunk) for field in (codes, gain, values, token_set, weight)), strict=True)
    return gather(parts, codes, weight * gain.square(), Moments.zeros(SETS, matrix))


def full_weight(out_features: int = N) -> Tensor:
    return torch.randn(out_features, K, generator=torch.Generator().manual_seed(9))


def regression(moments: Moments, absorbed: Tensor, shrinkage: float) -> Tensor:
    return regress(*moments.take_centred(), absorbed, shrinkage)


def output_gap(
    matrix: Tensor, moments: Moments, codes: Tensor, values: Tensor, token_set: Tensor, weight: Tensor
) -> float:
    """Weighted square error of codes @ matrix.T, with the best bias of each set, against the 16-bit output."""
    full = full_weight()
    bias = output_bias(*moments.means(), full, matrix, 1)[0]
    gap = codes @ matrix.T + bias[token_set] - values @ full.T
    return float(weight @ gap.square().sum(1))


@pytest.mark.parametrize("chunk", [1, 64, 499])
def test_chunks_merge_to_the_whole(chunk: int) -> None:
    values, codes, token_set, weight, _ = tokens()
    whole = moments_of(codes, values, token_set, weight)
    chunked = moments_of(codes, values, token_set, weight, chunk)
    for field in SUMS:
        # float32 sums of 500 terms in another order; magnitudes are about 10.
        assert torch.allclose(getattr(chunked, field), getattr(whole, field), rtol=1e-4, atol=1e-4), field


def test_every_field_is_summed_over_processes() -> None:
    values, codes, token_set, weight, _ = tokens()
    whole = moments_of(codes, values, token_set, weight)
    assert {*SUMS, "matrix"} == set(vars(whole))
    halves = [
        moments_of(*(field[part] for field in (codes, values, token_set, weight)))
        for part in (slice(200), slice(200, None))
    ]
    for field in SUMS:
        added = getattr(halves[0], field) + getattr(halves[1], field)
        assert torch.allclose(added, getattr(whole, field), rtol=1e-4, atol=1e-4), field  # as above


@pytest.mark.parametrize("out_features", [N, K], ids=["sums of outputs", "sums of values"])
@pytest.mark.parametrize("exact", [True, False], ids=["whole numbers", "float32"])
def test_moments_against_the_definition(out_features: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "calibration.quantize.int8_products.has_exact_products", has_exact_products if exact else lambda: False
    )
    # So that there are several runs of tokens and of channels, none of them of full length.
    monkeypatch.setattr("calibration.quantize.moments.CODE_TOKENS", 64)
    monkeypatch.setattr("calibration.quantize.moments.CODE_CHANNELS", 7)
    values, codes, token_set, _, _ = tokens()
    matrix, gain = full_weight(out_features), torch.tensor([1.0, 1.5])[token_set]
    # Two weights that go with gains, and one that does not.
    weight = torch.tensor([1.0, 0.5])[token_set].where(torch.arange(TOKENS) % 3 > 0, 0.25) / TOKENS
    moments = moments_of(codes, values, token_set, weight, matrix=matrix, gain=gain)
    assert moments.of_outputs == (out_features == N)
    code_mean, value_mean = moments.means()
    code_code, code_output = moments.take_centred()
    part = slice(3, 8)
    again = moments_of(codes, values, token_set, weight, matrix=matrix, gain=gain).take_centred(part)
    assert torch.equal(again[0], code_code) and torch.allclose(again[1], code_output[:, part], atol=1e-4)
    codes = codes * gain[:, None]
    expected_codes, expected_values = torch.zeros(K, K), torch.zeros(K, K)
    for index in range(SETS):
        own = token_set == index
        share = weight[own] / weight[own].sum()
        assert torch.allclose(code_mean[index], share @ codes[own], rtol=1e-4, atol=1e-5)
        assert torch.allclose(value_mean[index], share @ values[own], rtol=1e-4, atol=1e-5)
        centred = (codes[own] - share @ codes[own]) * weight[own, None]
        expected_codes += centred.T @ (codes[own] - share @ codes[own])
        expected_values += centred.T @ (values[own] - share @ values[own])
    # float32, and a difference of two sums up to ten times larger.
    assert torch.allclose(code_code, expected_codes, atol=1e-4)
    assert torch.allclose(code_output, expected_values @ matrix.T, atol=1e-3)


def test_a_set_without_tokens_has_zero_means() -> None:
    values, codes, _, weight, _ = tokens()
    moments = moments_of(codes, values, torch.zeros(TOKENS, dtype=torch.int64), weight)
    for mean in moments.means():
        assert bool((mean[1] == 0).all())
    assert bool((output_bias(*moments.means(), full_weight(), full_weight(), 1)[0, 1] == 0).all())
    assert all(bool(matrix.isfinite().all()) for matrix in moments.take_centred())


def test_strong_shrinkage_gives_the_absorbed_weights() -> None:
    values, codes, token_set, weight, step = tokens()
    absorbed = absorb(full_weight(), step)
    found = regression(moments_of(codes, values, token_set, weight), absorbed, 1e6)
    # What is left of the data is one part in 1e6 / K, and float32.
    assert torch.allclose(found, absorbed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [1e-3, 0.02, 1.0])
def test_exact_codes_give_the_absorbed_weights(shrinkage: float) -> None:
    """Where codes * step are the values, but for a constant, there is nothing to make up for."""
    _, codes, token_set, weight, step = tokens()
    values = codes * step + torch.randn(SETS, K, generator=torch.Generator().manual_seed(3))[token_set]
    absorbed = absorb(full_weight(), step)
    found = regression(moments_of(codes, values, token_set, weight), absorbed, shrinkage)
    # float32: about 1e-6 of the moments over the ridge of 1e-3.
    assert torch.allclose(found, absorbed, atol=5e-3 * float(absorbed.abs().max()))


def test_the_regression_lowers_the_output_error() -> None:
    values, codes, token_set, weight, step = tokens()
    moments = moments_of(codes, values, token_set, weight)
    absorbed = absorb(full_weight(), step)
    sample = (moments, codes, values, token_set, weight)
    errors = [output_gap(absorbed, *sample)]
    for shrinkage in (1.0, 0.02, 1e-4):
        found = regression(moments_of(codes, values, token_set, weight), absorbed, shrinkage)
        errors.append(output_gap(found, *sample))
    assert all(later < earlier for earlier, later in pairwise(errors)), "on the tokens it saw"
    assert errors[2] < 0.9 * errors[0]


def test_the_regression_is_least_squares() -> None:
    """With next to no shrinkage nothing near it does better."""
    values, codes, token_set, weight, step = tokens()
    moments = moments_of(codes, values, token_set, weight)
    found = regression(moments_of(codes, values, token_set, weight), absorb(full_weight(), step), 1e-6)
    sample = (moments, codes, values, token_set, weight)
    best = output_gap(found, *sample)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        moved = found + 0.01 * found.abs().mean() * torch.randn(N, K, generator=generator)
        assert best < output_gap(moved, *sample)


@pytest.mark.parametrize(("count", "low", "high"), [(2 * K, 0.0, 0.9), (10 * K, 0.9, 1.02)])
def test_few_tokens_need_a_strong_pull_and_many_do_not(count: int, low: float, high: float) -> None:
    """Errors on other tokens than those of the fit, whose targets hold errors that the codes cannot explain."""
    values, codes, token_set, weight, step = tokens()
    absorbed = absorb(full_weight(), step)
    values = values + 0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    sample = codes, values, token_set, weight
    own, others = (tuple(field[part] for field in sample) for part in (slice(count), slice(TOKENS // 2, None)))
    fitted = fitting_shrinkage(4.0, K, moments_of(*own).tokens)
    weak, strong = (
        output_gap(regression(moments_of(*own), absorbed, pull), moments_of(*others), *others)
        for pull in (0.02, fitted)
    )
    assert low * weak < strong < high * weak


def test_the_number_of_tokens_counts_their_weights() -> None:
    values, codes, token_set, weight, _ = tokens()
    even = torch.full_like(weight, 1 / TOKENS)
    assert moments_of(codes, values, token_set, even).tokens == pytest.approx(TOKENS, rel=1e-4)
    # A few tokens with nearly all of the weight.
    heavy = torch.where(torch.arange(TOKENS) < 20, 1.0, 1e-6)
    assert moments_of(codes, values, token_set, heavy).tokens == pytest.approx(20, rel=1e-2)
    assert Moments.zeros(SETS, full_weight()).tokens == 1
    assert fitting_shrinkage(4.0, 512, 1024) == 2.0


def test_inputs_that_never_move_leave_the_absorbed_weights() -> None:
    absorbed = absorb(full_weight(), torch.ones(K))
    nothing = torch.zeros(TOKENS, K)
    moments = moments_of(nothing, nothing, torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS))
    found = regression(moments, absorbed, 0.02)
    # The ridge is a float32 denormal there, of 17 bits.
    assert torch.allclose(found, absorbed, rtol=1e-3)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_bias_makes_each_sets_mean_output_equal(blocks: int) -> None:
    values, codes, token_set, weight, step = tokens()
    moments = moments_of(codes, values, token_set, weight)
    served = absorb(full_weight(), step) * 1.1
    bias = output_bias(*moments.means(), full_weight(), served, blocks)
    assert (bias.shape, bias.dtype) == ((blocks, SETS, N), torch.float32)
    y = codes @ served.T + bias.sum(0)[token_set]
    expected = values @ full_weight().T
    for index in range(SETS):
        own = token_set == index
        share = weight[own] / weight[own].sum()
        # float32 sums of 500 tokens and 24 channels, of size 10.
        assert torch.allclose(share @ y[own], share @ expected[own], atol=1e-4)


def test_blocks_of_the_bias_are_those_of_their_channels() -> None:
    values, codes, token_set, weight, step = tokens()
    served = absorb(full_weight(), step) * 1.1
    bias = output_bias(*moments_of(codes, values, token_set, weight).means(), full_weight(), served, 2)
    half = K // 2
    left = moments_of(codes[:, :half], values[:, :half], token_set, weight, matrix=full_weight()[:, :half])
    alone = output_bias(*left.means(), full_weight()[:, :half], served[:, :half], 1)[0]
    assert torch.allclose(bias[0], alone, atol=1e-4)  # float32 means, as above


def test_codes_that_never_change_tell_nothing() -> None:
    """As of an input that is zero on all tokens: the sums hold rounding errors alone, of either sign."""
    noise = -1e-12 * torch.eye(K)
    absorbed = absorb(full_weight(), torch.ones(K))
    assert torch.equal(regress(noise, torch.zeros(K, absorbed.shape[0]), absorbed, 0.02), absorbed)


def test_an_input_of_zeros_leaves_the_absorbed_weights_exactly() -> None:
    absorbed = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(regress(torch.zeros(64, 64), torch.zeros(64, 5), absorbed, 0.02), absorbed)
