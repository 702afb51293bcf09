"""Layers that stand out, and the command to serve."""

from pathlib import Path

from calibration.output.outcome import outcome_lines, standing_out


def named(**errors: float) -> dict[str, float]:
    return {name.replace("_at_", "."): error for name, error in errors.items()}


def layers(**errors: float) -> dict[str, dict[str, float]]:
    return {name: {"output_error": error} for name, error in named(**errors).items()}


def test_a_layer_stands_out_among_its_kind() -> None:
    found = standing_out(named(a_at_down=0.1, b_at_down=0.1, c_at_down=0.5, a_at_up=0.3, b_at_up=0.35, c_at_up=0.7))
    assert list(found) == ["c.down"] and round(found["c.down"], 6) == 5
    assert standing_out(named(a_at_down=0.0, b_at_down=0.0, c_at_down=0.5)) == {}


def test_the_last_line_serves_the_checkpoint() -> None:
    report = {"layers": layers(a_at_down=0.1, b_at_down=0.1, c_at_down=0.5), "escape_rate": 0.04}
    first, second, last = outcome_lines(report, Path("my model"))
    assert first == "my model: 3 layers quantized, escape rate 4.00%"
    assert "in 1 layers: c.down (5.0x)" in second
    assert last == "next: morphoquant doctor --model 'my model' && vllm serve 'my model'"


def test_experts_stand_out_among_each_other() -> None:
    figures = {"tokens": [5, 7, 0], "gate_up_error": [0.1, 0.1, None], "down_error": [0.1, 0.1, None]}
    other = figures | {"down_error": [0.1, 0.9, None]}
    report = {"layers": layers(a_at_q=0.1), "experts": {"x": figures, "y": other}, "escape_rate": 0.04}
    first, second, _ = outcome_lines(report, Path("out"))
    assert first.startswith("out: 1 layers and 6 experts quantized")
    assert "in 1 layers: y.1.down_proj (9.0x)" in second
