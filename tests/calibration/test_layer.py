import pytest
import torch
from torch import Tensor

from calibration.collect import Observation
from calibration.layer import MIN_MASK_TOKENS, QuantizedLayer, quantize_input
from calibration.recipe import Recipe
from calibration.sampling import TokenSample, choose_tokens
from morphoquant_vllm.numerics import activation, linear
from morphoquant_vllm.numerics.statistics import ChannelStatistics
from morphoquant_vllm.schema import LayerSpec, QuantizationSpec, check_values, tensor_specs, unequal_input_tensors

K = 64
TEXT, AUDIO, ANY = 0, 3, 4


def make_spec(shards: dict[str, Tensor], parallel: str = "column", blocks: int = 1) -> QuantizationSpec:
    layers = {
        name: LayerSpec(weight.shape[1], weight.shape[0], 32, parallel, "m.fused") for name, weight in shards.items()
    }
    return QuantizationSpec(layers=layers, tensor_parallel=blocks)


def observe(x: Tensor, modality: Tensor, balance: float = 1.0) -> tuple[Observation, TokenSample]:
    tokens = choose_tokens([modality], budget=x.shape[0], balance=balance, seed=0)
    statistics = {int(row): ChannelStatistics.of(x[modality == row]) for row in modality.unique()}
    return Observation(statistics, x[tokens.positions[0]]), tokens


def activations(tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Mostly text; channel 5 is heavy-tailed in text, channel 9 only in the few audio tokens."""
    torch.manual_seed(0)
    x = torch.randn(tokens, K)
    modality = torch.zeros(tokens, dtype=torch.int32)
    modality[-40:] = AUDIO
    x[::40, 5] *= 60
    x[-40::10, 9] *= 60
    return x, modality


def quantize(
    x: Tensor, modality: Tensor, shards: dict[str, Tensor], balance: float = 1.0, **settings: object
) -> dict[str, QuantizedLayer]:
    observation, tokens = observe(x, modality, balance)
    return quantize_input(observation, tokens, shards, make_spec(shards), Recipe(**settings))


def serve(x: Tensor, modality: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and output as the stored tensors give them."""
    record = activation.activation_record(
        *(tensors[name] for name in ("activation_step", "channel_order", "modality_mask", "centre", "gain"))
    )
    weight = linear.WeightRecord(tensors["weight_codes"], tensors["weight_scale"], tensors["absorbed_bias"])
    return activation.act_quant(x, modality, record), linear.linear(x, modality, weight, record)


def test_tensors_are_those_of_the_format_and_shards_share_their_input() -> None:
    x, modality = activations()
    shards = {"m.q": torch.randn(48, K), "m.k": torch.randn(16, K)}
    spec = make_spec(shards)
    quantized = quantize(x, modality, shards)
    for name, layer in quantized.items():
        for tensor, want in tensor_specs(spec.layers[name], len(spec.rows)).items():
            assert (layer.tensors[tensor].dtype, tuple(layer.tensors[tensor].shape)) == (want.dtype, want.shape)
        check_values(name, layer.tensors, spec.any_row, parallel="column", blocks=1)
    assert unequal_input_tensors(quantized["m.q"].tensors, quantized["m.k"].tensors) == []


def test_the_record_describes_what_is_served() -> None:
    x, modality = activations()
    weight = torch.randn(32, K)
    # Without balance every token counts the same, so that the weighted error is the plain one.
    layer = quantize(x, modality, {"m.q": weight}, balance=0.0)["m.q"]
    codes, y = serve(x, modality, layer.tensors)
    expected = x @ weight.T
    relative = float((y - expected).norm() / expected.norm())
    assert layer.record.output_error == pytest.approx(relative, rel=1e-4)  # float32 sums in another order
    # Rounding Gaussian data and weights to 4 bits costs 0.1 to 0.2; a wrong order, packing or centre costs about 1.
    assert 0 < relative < 0.3
    escaped = activation.escapes(codes).float()
    assert layer.record.escape_rate["text"] == pytest.approx(float(escaped[modality == TEXT].mean()))
    assert layer.record.escape_rate["audio"] == pytest.approx(float(escaped[modality == AUDIO].mean()))
    assert layer.record.escape_rate["all"] == pytest.approx(float(escaped.mean()))
    assert list(layer.record.escape_rate) == ["text", "audio", "all"]


def test_an_outlier_of_a_rare_modality_may_escape_and_nothing_seen_saturates() -> None:
    x, modality = activations()
    layer = quantize(x, modality, {"m.q": torch.randn(32, K)})["m.q"]
    mask = layer.tensors["modality_mask"][ANY]
    assert mask.nonzero().flatten().tolist() == [5, 9]
    assert layer.record.masked_channels == dict.fromkeys(("text", "image", "video", "audio", "any"), 2)
    codes, _ = serve(x, modality, layer.tensors)
    order = layer.tensors["channel_order"].long()
    masked = codes[:, mask[order]]
    assert bool(activation.escapes(masked).any())
    assert int(masked.abs().max()) <= activation.GUARD_CODES
    assert not bool(activation.escapes(codes[:, ~mask[order]]).any())


@pytest.mark.parametrize("rare", [1, 2, MIN_MASK_TOKENS - 1])
def test_a_modality_of_a_few_tokens_has_no_mask_of_its_own(rare: int) -> None:
    x, modality = activations()
    modality[-40:] = TEXT
    text_only = quantize(x, modality, {"m.q": torch.randn(32, K)})["m.q"]
    modality[-rare:] = AUDIO
    layer = quantize(x, modality, {"m.q": torch.randn(32, K)})["m.q"]
    assert set(layer.record.escape_rate) == {"text", "audio", "all"}
    # The text's heavy tails alone, although some channel always stands out of a few tokens (and every one of one).
    assert layer.tensors["modality_mask"][ANY].nonzero().flatten().tolist() == [5, 9]
    assert torch.equal(layer.tensors["modality_mask"], text_only.tensors["modality_mask"])


def test_modalities_of_a_few_tokens_each_are_masked_together() -> None:
    torch.manual_seed(0)
    x = torch.randn(MIN_MASK_TOKENS, K)
    x[::8, 11] *= 60
    modality = torch.zeros(MIN_MASK_TOKENS, dtype=torch.int32)
    modality[1::2] = AUDIO
    mask = quantize(x, modality, {"m.q": torch.randn(32, K)})["m.q"].tensors["modality_mask"][ANY]
    assert mask.nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("tokens", [1, 100])
def test_inputs_without_spread_mask_nothing(tokens: int) -> None:
    x = torch.randn(1, K).repeat(tokens, 1)
    layer = quantize(x, torch.zeros(tokens, dtype=torch.int32), {"m.q": torch.randn(32, K)})["m.q"]
    assert not bool(layer.tensors["modality_mask"].any())
    check_values("m.q", layer.tensors, ANY, parallel="column", blocks=1)


def test_the_guard_is_reported() -> None:
    x, modality = activations()
    # The nearer edge is small and the farther one far: the guard has to raise the step.
    x[:, 5] = x[:, 5].abs()
    x[0, 5], x[1, 5] = -0.01, 500.0
    layer = quantize(x, modality, {"m.q": torch.randn(32, K)})["m.q"]
    assert float(layer.tensors["activation_step"][5]) == pytest.approx(500 / activation.GUARD_CODES)
    # Channel 9, masked too, has outliers on both sides: its nearer edge is wide enough.
    assert layer.record.guard_raised_channels == 1
    # Unguarded, the step is at most 2 * 0.01 / 15.
    assert layer.record.guard_largest_raise >= 500 / activation.GUARD_CODES / (0.02 / 15) * (1 - 1e-6)


def test_full_mask_patterns_mask_every_channel() -> None:
    x, modality = activations()
    shards = {"m.q": torch.randn(32, K)}
    for pattern in ("*.q", "m.fused"):
        layer = quantize(x, modality, shards, full_mask=(pattern,))["m.q"]
        assert bool(layer.tensors["modality_mask"].all())


def test_a_dead_channel_and_a_constant_input_stay_finite() -> None:
    modality = torch.zeros(50, dtype=torch.int32)
    x = torch.randn(50, K)
    x[:, 3] = 0
    layer = quantize(x, modality, {"m.q": torch.randn(32, K)})["m.q"]
    check_values("m.q", layer.tensors, ANY, parallel="column", blocks=1)
    layer = quantize(torch.zeros(50, K), modality, {"m.q": torch.randn(32, K)})["m.q"]
    check_values("m.q", layer.tensors, ANY, parallel="column", blocks=1)
    assert layer.record.output_error == 0


def test_a_one_sided_channel_gets_a_centre_that_the_bias_gives_back() -> None:
    modality = torch.zeros(300, dtype=torch.int32)
    x = torch.randn(300, K)
    x[:, 7] = 20 + torch.rand(300)
    weight = torch.randn(32, K)
    layer = quantize(x, modality, {"m.q": weight})["m.q"]
    centre = layer.tensors["centre"]
    assert float(centre[ANY, 7]) == pytest.approx(20.5, abs=0.6)
    assert torch.equal(layer.tensors["absorbed_bias"], (centre.double() @ weight.double().T).float())
    assert layer.record.output_error < 0.3  # as above


def test_row_parallel_orders_stay_within_blocks() -> None:
    x, modality = activations()
    shards = {"m.o": torch.randn(32, K)}
    observation, tokens = observe(x, modality)
    layer = quantize_input(observation, tokens, shards, make_spec(shards, "row", 2), Recipe())["m.o"]
    order = layer.tensors["channel_order"]
    assert sorted(order[: K // 2].tolist()) == list(range(K // 2))
    assert order.tolist() != list(range(K))


def test_balance_decides_for_whom_the_weights_are_rounded() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, K) * 0.05
    modality = torch.zeros(1000, dtype=torch.int32)
    # Audio tokens live on the first half of the channels, text on the second.
    modality[-30:] = AUDIO
    x[:-30, : K // 2] *= 0.05
    x[-30:, K // 2 :] *= 0.05
    weight = torch.randn(256, K)

    def audio_error(balance: float) -> float:
        layer = quantize(x, modality, {"m.q": weight}, balance=balance)["m.q"]
        audio = modality == AUDIO
        _, y = serve(x[audio], modality[audio], layer.tensors)
        return float((y - x[audio] @ weight.T).norm())

    assert audio_error(1.0) < audio_error(0.0)
