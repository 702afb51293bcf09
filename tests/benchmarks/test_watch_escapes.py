"""Steps are sorted into counted and not counted as the watch counts them, and differ by neighbours."""

from types import SimpleNamespace

import pytest

from benchmarks.watch_escapes.__main__ import summarize, timed_steps


def test_steps_are_sorted_as_the_watch_counts_them() -> None:
    from contextlib import contextmanager

    watch = SimpleNamespace(steps=0)

    @contextmanager
    def step(tokens: int):
        watch.steps += bool(tokens)
        yield

    watch.step = step
    found: dict[int, dict[str, list[float]]] = {}
    with timed_steps(watch, found):
        for tokens in (8, 1, 1, 0, 1):
            with watch.step(tokens):
                pass
    assert {tokens: (len(t["counted"]), len(t["not counted"])) for tokens, t in found.items()} == {8: (1, 0), 1: (1, 2)}


def test_a_summary_has_medians_and_the_difference_of_neighbours() -> None:
    times = {"counted": [0.004, 0.010, 0.003], "not counted": [0.003, 0.008, 0.002]}
    assert summarize(times) == {
        "counted_ms": pytest.approx(4),
        "not_counted_ms": pytest.approx(3),
        "difference_ms": pytest.approx(1),
        "steps": 6,
    }
