"""Accuracy with confidence intervals, overall and by group, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from scipy.stats import binomtest

from benchmarks.common.questions.items import Item
from benchmarks.common.questions.scoring import REFUSED, RIGHT, UNPARSED, WRONG, Score, outcome

CONFIDENCE = 0.95
T = TypeVar("T")


def summarise(items: Sequence[Item], responses: Mapping[str, str | None], score: Score) -> dict[str, Any]:
    """Figures of the answered questions: "all", and "by" every kind of group.

    Responses that are not parsed and requests that the server refused count as not right, and are counted separately.
    """
    outcomes = [(item, outcome(item, responses[item.id], score)) for item in items if item.id in responses]
    by = {kind: {name: figures(found) for name, found in groups.items()} for kind, groups in grouped(outcomes).items()}
    return {"questions": len(items), "all": figures([found for _, found in outcomes]), "by": by}


def grouped(outcomes: Sequence[tuple[Item, T]]) -> dict[str, dict[str, list[T]]]:
    """Outcomes by kind of group and by group, the groups in the order of their names."""
    kinds = list(dict.fromkeys(kind for item, _ in outcomes for kind in item.groups))
    by: dict[str, dict[str, list[T]]] = {}
    for kind in kinds:
        groups: dict[str, list[T]] = {}
        for item, found in outcomes:
            if kind in item.groups:
                groups.setdefault(item.groups[kind], []).append(found)
        by[kind] = {name: groups[name] for name in sorted(groups)}
    return by


def figures(outcomes: Sequence[str]) -> dict[str, Any]:
    """Counts, accuracy, and its Wilson interval, of at least no outcome (then without accuracy)."""
    counts = {name: outcomes.count(name) for name in (RIGHT, WRONG, UNPARSED, REFUSED)}
    if not outcomes:
        return {"answered": 0, **counts, "accuracy": None, "interval": None}
    interval = binomtest(counts[RIGHT], len(outcomes)).proportion_ci(CONFIDENCE, method="wilson")
    return {
        "answered": len(outcomes),
        **counts,
        "accuracy": counts[RIGHT] / len(outcomes),
        "interval": [float(interval.low), float(interval.high)],
    }


def table(benchmark: str, summary: Mapping[str, Any]) -> Table:
    """The same for people."""
    title = f"{benchmark}: accuracy with {CONFIDENCE:.0%} interval"
    return layout(title, ("accuracy", "interval", "right", "of", UNPARSED, REFUSED), summary, _cells)


def layout(
    title: str, headings: Sequence[str], summary: Mapping[str, Any], cells: Callable[[Mapping[str, Any]], list[str]]
) -> Table:
    """A table of a summary: one row for all, one for each group."""
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("", overflow="fold")
    for heading in headings:
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_row("all", *cells(summary["all"]))
    for kind, groups in summary["by"].items():
        found.add_section()
        found.add_row(f"by {kind}")
        for name, entry in groups.items():
            found.add_row(f"  {name}", *cells(entry))
    return found


def _cells(entry: Mapping[str, Any]) -> list[str]:
    known = entry["accuracy"] is not None
    accuracy = f"{entry['accuracy']:.1%}" if known else "-"
    interval = "{:.1%} to {:.1%}".format(*entry["interval"]) if known else "-"
    return [accuracy, interval, *(str(entry[key]) for key in (RIGHT, "answered", UNPARSED, REFUSED))]
