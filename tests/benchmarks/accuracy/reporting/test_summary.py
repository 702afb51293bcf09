"""How methods are set against ours."""

import math

import pytest

from benchmarks.accuracy.omni import QUESTIONS
from benchmarks.accuracy.reporting import plots, report, summary


def test_language_methods_are_set_against_ours_on_the_same_windows() -> None:
    ours = {"a": {"losses": [10.0, 20.0], "tokens": 20}, "b": {"losses": [12.0, 16.0], "tokens": 20}}
    worse = {
        name: {**text, "losses": [loss + extra for loss, extra in zip(text["losses"], (1.0, 3.0), strict=True)]}
        for name, text in ours.items()
    }
    found = summary._language_against(worse, {"served": ours, "worse": worse})
    assert found is not None
    # 8 more over 40 tokens; gaps per token of 0.1, 0.3, 0.1 and 0.3.
    assert found["ratio"] == pytest.approx(math.exp(0.2))
    assert found["error"] == pytest.approx(math.exp(0.2) * 0.1 / math.sqrt(3))
    assert report._against_ours(found) == "1.221 ± 0.071"
    same = summary._language_against(ours, {"served": ours})
    assert same == {"ratio": 1.0, "error": 0.0}


def test_methods_without_every_text_are_not_compared() -> None:
    ours = {"a": {"losses": [10.0, 20.0], "tokens": 20}, "b": {"losses": [12.0, 16.0], "tokens": 20}}
    assert summary._language_against({"a": ours["a"]}, {"served": ours}) is None
    assert summary._language_against(ours, {}) is None
    assert report._against_ours(None) == ""


def test_omni_methods_are_set_against_ours_question_by_question() -> None:
    ours = {QUESTIONS: {"right": {"image": [1, 1, 1, 0], "text": [1, 1]}}}
    other = {QUESTIONS: {"right": {"image": [1, 0, 1, 1], "text": [0, 1]}}}
    found = summary._omni_against(other, {"served": ours})
    assert found is not None
    assert found["difference"] == pytest.approx(1 / 6)
    # Differences 0, 1, 0, -1, 1, 0: McNemar's error.
    assert found["error"] == pytest.approx(math.sqrt((3 - 6 / 36) / 5 / 6))
    assert report._against_ours(found) == "+16.67 ± 30.73"
    assert summary._omni_against(other, {}) is None


@pytest.mark.parametrize("methods", [1, 60])
def test_the_chart_takes_any_number_of_methods(methods: int) -> None:
    row = {"accuracy": 0.9, "error": 0.01}
    entries = {f"method {index}": {"kind": "served", "kinds": {"all": row}} for index in range(methods)}
    chart = plots.chart({"benchmark": "omni", "model": {"name": "tiny"}, "methods": entries})
    assert chart.startswith(b"\x89PNG")
