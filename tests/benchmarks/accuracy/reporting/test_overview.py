"""The table of all methods and models."""

from pathlib import Path
from typing import Any

from benchmarks.accuracy.reporting import overview

BEYOND = {"rate": 0.04, "worst_rate": 0.05}


def summary(methods: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"name": "m"}, "machine": "cpu", "methods": methods}


def text(ratio: float | None, activations: dict[str, float] | None = None) -> dict[str, Any]:
    return {"texts": {}, "against_16bit": {"ratio": ratio, "error": 0.01}, "activations": activations}


def omni(**row: Any) -> dict[str, Any]:
    return {"kinds": {"all": {"accuracy": 0.9, **row}}, "activations": {**BEYOND, "rate": 0.03}}


def test_every_method_has_a_line_and_unmeasured_cells_are_empty(tmp_path: Path) -> None:
    differs = {"difference": -0.025, "difference_interval": [-0.035, -0.015]}
    summaries = {
        "language": summary({"16bit": text(1.0), "served": text(1.1, BEYOND)}),
        "omni": summary({"served": omni(divergence=0.0123, divergence_error=0.0011, **differs)}),
    }
    found = overview.overview(summaries, ["16bit", "served", "w4a16-nf4"], {}, "python -m benchmarks.accuracy table")
    header, rows = overview.table(found)
    assert header == ["method", "language", "omni KL", "omni points lost", "beyond 4 bits"]
    assert rows == [
        ["16bit", "1.000 ± 0.010", "", "", ""],
        ["served", "1.100 ± 0.010", "12.3 ± 1.1", "2.50 (1.50 to 3.50)", "4.00%"],
        ["w4a16-nf4", "", "", "", ""],
    ]
    overview.write(found, tmp_path)
    assert "| served | 1.100 ± 0.010 |" in (tmp_path / "overview.md").read_text()


def test_a_model_that_is_lost_is_infinitely_worse() -> None:
    found = overview.overview({"language": summary({"served": text(None)})}, ["served"], {}, "")
    assert overview.table(found)[1] == [["served", "inf", ""]]


def test_a_method_that_a_model_cannot_have_has_a_dash_and_its_reason(tmp_path: Path) -> None:
    summaries = {"language": summary({"16bit": text(1.0)}), "omni": summary({})}
    left_out = {"language": {"a": "K = 576", "b": "K = 576"}, "omni": {"16bit": "no"}}
    found = overview.overview(summaries, ["16bit", "a", "b"], left_out, "")
    assert overview.table(found)[1] == [
        ["16bit", "1.000 ± 0.010", "-", "-", ""],
        ["a", "-", "", "", ""],
        ["b", "-", "", "", ""],
    ]
    overview.write(found, tmp_path)
    page = (tmp_path / "overview.md").read_text()
    assert "\n- language, `a`, `b`: K = 576\n- omni, `16bit`: no\n" in page
