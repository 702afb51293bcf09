"""Layers that stand out, and the command to serve."""

from pathlib import Path

import pytest

from calibration.output.outcome import above_neighbours, block_losses, outcome_lines, standing_out


def named(**errors: float) -> dict[str, float]:
    return {name.replace("_at_", "."): error for name, error in errors.items()}


def layers(**errors: float) -> dict[str, dict[str, float]]:
    return {name: {"output_error": error} for name, error in named(**errors).items()}


def test_a_layer_stands_out_among_its_kind() -> None:
    found = standing_out(named(a_at_down=0.1, b_at_down=0.1, c_at_down=0.5, a_at_up=0.3, b_at_up=0.35, c_at_up=0.7))
    assert list(found) == ["c.down"] and round(found["c.down"], 6) == 5
    assert standing_out(named(a_at_down=0.0, b_at_down=0.0, c_at_down=0.5)) == {}


def test_a_block_is_compared_with_its_neighbours() -> None:
    assert above_neighbours({0: 0.1, 1: 0.25, 2: 0.1, 3: 0.15}) == {1: pytest.approx(2.5)}
    assert above_neighbours({0: 0.3, 1: 0.1, 2: 0.1}) == {0: pytest.approx(3)}, "the first has one neighbour"
    assert above_neighbours({5: 0.3}) == above_neighbours({0: 0.0, 1: 0.1}) == {}


def test_a_blocks_loss_is_the_mean_of_its_layers() -> None:
    found = block_losses(
        {
            name: {"output_error": error}
            for name, error in {
                "m.layers.10.up": 0.1,
                "m.layers.10.down": 0.3,
                "m.layers.9.up": 0.1,
                "t.2.q": 1,
            }.items()
        }
    )
    assert found == {"m.layers": {9: pytest.approx(0.1), 10: pytest.approx(0.2)}, "t": {2: 1}}
    assert list(found["m.layers"]) == [9, 10], "in the order of the model"


def test_the_lines_name_blocks_that_stand_out() -> None:
    layers = {f"m.layers.{index}.up": {"output_error": error} for index, error in enumerate((0.1, 0.4, 0.1))}
    lines = outcome_lines({"layers": layers, "escape_rate": 0.04}, Path("out"))
    assert lines[1:3] == [
        "losses in m.layers: 0.1000 (block 0) to 0.4000 (block 1)",
        "losses far above those of the neighbours, in blocks: 1 (4.0x)",
    ]


def test_the_last_line_serves_the_checkpoint() -> None:
    report = {"layers": layers(a_at_down=0.1, b_at_down=0.1, c_at_down=0.5), "escape_rate": 0.04}
    first, second, last = outcome_lines(report, Path("my model"))
    assert first == "my model: 3 layers quantized, escape rate 4.00%"
    assert "in 1 layers: c.down (5.0x)" in second
    assert last == "next: morphoquant doctor --model 'my model' && VLLM_CPU_KVCACHE_SPACE=4 vllm serve 'my model'"


def test_experts_stand_out_among_each_other() -> None:
    figures = {"tokens": [5, 7, 0], "gate_up_error": [0.1, 0.1, None], "down_error": [0.1, 0.1, None]}
    other = figures | {"down_error": [0.1, 0.9, None]}
    report = {"layers": layers(a_at_q=0.1), "experts": {"x": figures, "y": other}, "escape_rate": 0.04}
    first, second, _ = outcome_lines(report, Path("out"))
    assert first.startswith("out: 1 layers and 6 experts quantized")
    assert "in 1 layers: y.1.down_proj (9.0x)" in second
