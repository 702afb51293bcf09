"""The benchmark of the host's time, on one small layer: what it measures, and its table."""

from pathlib import Path

import pytest

from benchmarks.gpu_host import __main__ as command
from benchmarks.gpu_host import layers
from benchmarks.gpu_host.report import markdown


def test_both_ways_make_the_same_launches_and_the_bound_one_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.GPU_LAYERS, "o", (256, 256))
    monkeypatch.setattr(command, "CALLS", 30)
    monkeypatch.setattr(command, "ROUNDS", 3)
    with layers.built(["o"]) as made:
        assert [layer.two_level for layer in made] == [False, True]
        rows = [command.measure(made[0], 1)]
        assert made[0].launches(made[0].call("jit", 1)) == rows[0]["launches"]
    assert rows[0]["bound"]["us"] < rows[0]["jit"]["us"]
    assert rows[0]["bound"]["python_calls"] < rows[0]["jit"]["python_calls"]
    text = markdown({"machine": "A", "versions": {"triton": "3"}, "load": 0.0, "contended": False, "rows": rows})
    assert f"| o | group | 1 | {rows[0]['launches']} |" in text


def test_its_functions_of_python_are_counted() -> None:
    def inner() -> None:
        pass

    assert command.python_calls(lambda: (inner(), inner())) == 2


def test_results_are_kept_beside_the_others() -> None:
    assert command.parser().parse_args([]).results == Path("benchmarks/results/gpu_host")
