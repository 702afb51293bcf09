"""The estimate of a calibration's time against measured blocks."""

from dataclasses import replace

import pytest

from calibration.blocks import time_need
from morphoquant_vllm.format.layers import ExpertsSpec, LayerSpec


def block(hidden: int, kv: int, inner: int) -> list[LayerSpec]:
    """The seven linears of a block."""
    inputs = {
        "qkv_proj": (hidden, (hidden, kv, kv)),
        "o_proj": (hidden, (hidden,)),
        "gate_up_proj": (hidden, (inner, inner)),
        "down_proj": (inner, (hidden,)),
    }
    return [LayerSpec(k, n, 32, "column", name) for name, (k, outputs) in inputs.items() for n in outputs]


@pytest.mark.parametrize(
    ("layers", "tokens", "drawn", "seconds"),
    [
        # docs/results/calibration.md: 3B layout, 64 samples of 512 tokens, at 193 GFLOP/s.
        (block(2048, 256, 11008), 64 * 512, 16384, 160.7),
        # An older run of the demo, on the machine of the line above: 29 blocks left of 30 after the first.
        (block(576, 192, 1536), 9070, 8192, 223 / 29),
    ],
)
def test_measured_blocks_come_out_within_a_tenth(
    layers: list[LayerSpec], tokens: int, drawn: int, seconds: float
) -> None:
    assert time_need.operations(layers, tokens, drawn) / 193e9 == pytest.approx(seconds, rel=0.1)


def test_a_measured_block_of_experts_comes_out_within_a_tenth() -> None:
    # docs/results/calibration.md: 30B-A3B layout, 16 samples of 512 tokens, at 84.4 GFLOP/s; seconds of the core.
    qkv = [LayerSpec(2048, n, 32, "column", "qkv_proj") for n in (4096, 512, 512)]
    work = time_need.operations([*qkv, LayerSpec(4096, 2048, 32, "column", "o_proj")], 8192, 8192)
    work += time_need.experts_operations(ExpertsSpec(128, 2048, 768, 32), 8, 8192, 8192)
    assert work / 84.4e9 == pytest.approx(1081, rel=0.1)


def test_two_blocks_take_twice_the_time_of_one() -> None:
    one = block(64, 32, 128)
    other = [replace(layer, shared_input=f"second.{layer.shared_input}") for layer in one]
    assert time_need.operations([*one, *other], 100, 10) == 2 * time_need.operations(one, 100, 10)


def test_experts_take_longer_if_there_are_more_of_them_or_each_sees_more_tokens() -> None:
    def work(count: int = 128, chosen: int = 8, drawn: int = 16384) -> float:
        return time_need.experts_operations(ExpertsSpec(count, 2048, 768, 32), chosen, 16384, drawn)

    # With the same tokens for each, all but the shared input and the products of the model's two streams.
    assert work(256, 16) == pytest.approx(2 * work(), rel=0.03)
    assert work(drawn=1024) < work() < work(chosen=16) < 1.5 * work()


def test_sharing_a_budget_takes_the_time_of_its_tokens() -> None:
    layers = block(576, 192, 1536)
    some, all_blocks = time_need.sharing_operations(layers, 1024), time_need.operations(layers, 16384, 16384)
    assert time_need.sharing_operations(layers, 4096) == 4 * some
    # docs/design/streaming.md: the stage took as long as 7 of 30 blocks.
    assert 4 * some / all_blocks == pytest.approx(7 / 30, rel=0.1)


def test_metrics_take_the_time_of_their_tokens_and_of_the_layers_that_have_one() -> None:
    layers = {str(place): layer for place, layer in enumerate(block(576, 192, 1536))}
    wide = {place: layer for place, layer in layers.items() if layer.shared_input == "gate_up_proj"}
    # Passes forward and back, and nothing else.
    assert time_need.metric_operations(wide, 100) == 6 * 100 * 2 * 576 * 1536
    without = 6 * 8192 * sum(layer.in_features * layer.out_features for layer in layers.values())
    moments = 2 * 8192 * (3 * 576**2 + 2 * 192**2)
    assert without + moments < time_need.metric_operations(layers, 8192) < without + 1.3 * moments


def test_the_speed_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's: products take 4, 2 and 3 seconds."""
    ticks = iter((0.0, 4.0, 10.0, 12.0, 20.0, 23.0))
    turns = iter((0.0, 0.1, 0.2, 0.3, 99.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr("time.monotonic", lambda: next(turns))
    monkeypatch.setattr(time_need, "PRODUCT", (3, 4, 5))
    assert time_need.product_speed() == 2 * 3 * 4 * 5 / 2.0
