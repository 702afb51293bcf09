"""One input's weights: fits, rounding, blocks of ranks, the mean output, and samples that are held out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens, choose_tokens
from calibration.quantize.layer import DrawnInput, quantize_input
from calibration.quantize.observation import Observation
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import ExpertsSpec
from morphoquant_vllm.format.values import check_values
from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.statistics import ChannelStatistics
from tests.calibration.inputs import (
    ANY,
    AUDIO,
    PLAIN,
    TEXT,
    K,
    activations,
    make_spec,
    matrix,
    quantize,
    relative,
    serve,
    with_massive,
)
from tests.records import rank_part


def test_regression_and_compensation_lower_the_output_error() -> None:
    x, modality, outlying = with_massive()
    # What the layers before lost: the served input is a distorted copy of the 16-bit one.
    distorted = x + 0.3 * activations(seed=1)[0].clamp(-3, 3) @ torch.randn(
        K, K, generator=torch.Generator().manual_seed(5)
    ).div(K**0.5)
    distorted[outlying] = x[outlying]

    def error(**settings: object) -> float:
        layer = quantize(distorted, modality, {"m.q": matrix()}, balance=0.0, outlying=outlying, x16=x, **settings)[
            "m.q"
        ]
        return layer.figures.output_error

    plain, regressed, compensated = error(**PLAIN), error(rounding="nearest"), error(regression=False)
    assert regressed < plain
    assert compensated < plain
    assert error() < min(regressed, compensated)


def test_two_level_scales_cost_a_few_percent_of_the_error() -> None:
    x, modality, outlying = with_massive()
    layers = [
        quantize(x, modality, {"m.q": matrix()}, balance=0.0, outlying=outlying, scale_levels=levels)["m.q"]
        for levels in (0, 16)
    ]
    # Two groups of K = 64: whole levels are off by up to a sixteenth of the larger scale.
    ordinary = [relative(serve(x, layer.tensors)[1][~outlying], x[~outlying] @ matrix().T) for layer in layers]
    assert ordinary[1] < 1.1 * ordinary[0]


def test_the_output_aims_at_the_16_bit_input() -> None:
    """A served input that is off by a constant and by a factor: both are made up for."""
    x, modality = activations()
    weight = matrix()
    served = 0.9 * x + 2.0
    layer = quantize(served, modality, {"m.q": weight}, balance=0.0, x16=x)["m.q"]
    _, y = serve(served, layer.tensors)
    expected = x @ weight.T
    assert layer.figures.output_error == pytest.approx(relative(y, expected), rel=1e-3)
    assert relative(y, expected) < 0.15
    # float32 sums over 400 tokens of outputs of about 100.
    assert torch.allclose(y.mean(0), expected.mean(0), atol=1e-3)


@pytest.mark.parametrize("settings", [{}, PLAIN])
def test_the_mean_output_of_each_set_of_tokens_is_right(settings: dict[str, object]) -> None:
    x, modality, outlying = with_massive()
    weight = matrix()
    layer = quantize(x, modality, {"m.q": weight}, balance=0.0, outlying=outlying, **settings)["m.q"]
    _, y = serve(x, layer.tensors)
    for tokens in (outlying, ~outlying):
        expected = (x[tokens] @ weight.T).mean(0)
        # float32 sums and constants at outputs of up to 2000.
        assert torch.allclose(y[tokens].mean(0), expected, atol=2e-3)


@pytest.mark.parametrize("blocks", [2])
def test_blocks_of_a_row_parallel_layer_stand_alone(blocks: int) -> None:
    x, modality, outlying = with_massive()
    shards = {"m.o": matrix()}
    layer = quantize(x, modality, shards, outlying=outlying, spec=make_spec(shards, "row", blocks))["m.o"]
    check_values("m.o", layer.tensors, ANY, parallel="row", blocks=blocks)
    order = layer.tensors["channel_order"]
    assert sorted(order[: K // blocks].tolist()) == list(range(K // blocks))
    assert order.tolist() != list(range(K))
    _, whole = serve(x, layer.tensors)
    parts = [serve(part, rank_part(layer.tensors, rank, blocks))[1] for rank, part in enumerate(x.chunk(blocks, 1))]
    # Both halves know these massive tokens. Each part and each constant is rounded to float32, at up to 2000.
    assert torch.allclose(sum(parts), whole, atol=3 * 2000 * 2.0**-23)


def test_balance_decides_for_whom_the_weights_are_rounded() -> None:
    x = torch.randn(1000, K, generator=torch.Generator().manual_seed(0)) * 0.05
    modality = torch.zeros(1000, dtype=torch.int32)
    # Audio tokens live on the first half of the channels, text on the second.
    modality[-30:] = AUDIO
    x[:-30, : K // 2] *= 0.05
    x[-30:, K // 2 :] *= 0.05
    weight, audio = matrix(256), modality == AUDIO

    def audio_error(balance: float) -> float:
        layer = quantize(x, modality, {"m.q": weight}, balance=balance)["m.q"]
        _, y = serve(x[audio], layer.tensors)
        return float((y - x[audio] @ weight.T).norm())

    assert audio_error(1.0) < audio_error(0.0)


@pytest.mark.parametrize("levels", [0, 16])
@pytest.mark.parametrize("rounding", ["compensated", "nearest"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_an_input_that_is_zero_on_all_tokens_is_rounded_plainly(levels: int, rounding: str, tokens: int) -> None:
    weight = matrix()
    x, modality = torch.zeros(tokens, K), torch.zeros(tokens, dtype=torch.int32)
    layer = quantize(x, modality, {"m.q": weight}, scale_levels=levels, rounding=rounding)["m.q"]
    assert layer.figures.output_error == 0 and layer.figures.escape_rate["all"] == 0
    order = layer.tensors["channel_order"]
    scales = ("weight_level", "weight_channel_scale") if levels else ("weight_scale",)
    served = weights.dequantize_weight(layer.tensors["weight_codes"], *(layer.tensors[name] for name in scales))
    served /= layer.tensors["activation_step"][order]
    # Nothing makes up for anything: each weight is off by a step of its group at most, as by plain rounding.
    groups = weight[:, order].unflatten(1, (-1, 32))
    assert float(((served.unflatten(1, (-1, 32)) - groups).abs() / (groups.abs().amax(-1, keepdim=True) / 7)).max()) < 1
    assert relative(served, weight[:, order]) < 0.12


# --- held-out samples


def in_samples(x: Tensor, noise: float, samples: int) -> tuple[DrawnInput, DrawnTokens]:
    """Text tokens x [T, K] in equal samples; the input of the 16-bit model differs by noise, as after other layers."""
    modality = torch.zeros(x.shape[0], dtype=torch.int32)
    tokens = choose_tokens(list(modality.tensor_split(samples)), x.shape[0], 1.0, 0)
    x16 = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    statistics = {TEXT: ChannelStatistics.of(x)}
    return DrawnInput(Observation(statistics, x), x16, torch.zeros(x.shape[0], dtype=torch.bool)), tokens


def made(sample: DrawnInput, tokens: DrawnTokens, **settings: object) -> dict[str, Tensor]:
    shards = {"m.q": matrix()}
    spec = make_spec(shards, scheme="two_level")
    return quantize_input(sample, tokens, shards, spec, Recipe(**settings))["m.q"].tensors


def test_beside_experts_no_sample_is_held_out() -> None:
    sample, tokens = in_samples(activations(320)[0], 1.0, 16)
    shards = {"m.q": matrix()}
    spec = replace(make_spec(shards, scheme="two_level"), experts={"m.experts": ExpertsSpec(8, 64, 32, 32)})
    fast, *others = (
        quantize_input(sample, tokens, shards, spec, Recipe(effort=effort))["m.q"].tensors
        for effort in ("fast", "default", "best")
    )
    assert all(torch.equal(fast[name], value) for other in others for name, value in other.items())


def test_the_bias_counts_held_out_tokens() -> None:
    """Their mean is far from the others', and the output on all tokens still has no offset."""
    x = activations(320)[0]
    x[-20:] += 3
    sample, tokens = in_samples(x, 0.0, 16)
    gap = serve(x, made(sample, tokens, effort="default"))[1] - x @ matrix().T
    assert float(gap.mean(0).norm()) < 1e-3 * float(gap.norm(dim=1).mean())


def test_fast_holds_no_sample_out_and_the_default_fits_the_others_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, tokens = in_samples(activations(320)[0], 1.0, 16)
    slow = made(sample, tokens, effort="default")
    monkeypatch.setattr("calibration.quantize.layer.tokens_of_held_samples", lambda tokens, effort: None)
    expected = made(sample, tokens, effort="default")
    monkeypatch.undo()
    fast = made(sample, tokens, effort="fast")
    assert all(torch.equal(fast[name], value) for name, value in expected.items())
    assert not torch.equal(fast["weight_codes"], slow["weight_codes"])
