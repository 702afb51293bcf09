"""Layers that stand out, and the command to serve."""

from pathlib import Path

from calibration.output.outcome import outcome_lines, standing_out


def layers(**errors: float) -> dict[str, dict[str, float]]:
    return {name.replace("_at_", "."): {"output_error": error} for name, error in errors.items()}


def test_a_layer_stands_out_among_its_kind() -> None:
    found = standing_out(layers(a_at_down=0.1, b_at_down=0.1, c_at_down=0.5, a_at_up=0.3, b_at_up=0.35, c_at_up=0.7))
    assert list(found) == ["c.down"] and round(found["c.down"], 6) == 5
    assert standing_out(layers(a_at_down=0.0, b_at_down=0.0, c_at_down=0.5)) == {}


def test_the_last_line_serves_the_checkpoint() -> None:
    report = {"layers": layers(a_at_down=0.1, b_at_down=0.1, c_at_down=0.5), "escape_rate": 0.04}
    first, second, last = outcome_lines(report, Path("my model"))
    assert first == "my model: 3 layers quantized, escape rate 4.00%"
    assert "in 1 layers: c.down (5.0x)" in second
    assert last == "next: morphoquant doctor --model 'my model' && VLLM_CPU_KVCACHE_SPACE=4 vllm serve 'my model'"
