"""Tables of a mixture of experts: paired intervals of answers, and the errors of experts."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.accuracy.methods import MOE_OMNI
from benchmarks.accuracy.omni import EXPERT_ERRORS

INTERVALS = "Points over 16 bit on the same questions, and the 95 % interval."
CAPTION = (
    "Error of an expert's output over the tokens that chose it, in % of the 16-bit output's norm, on 16-bit inputs: "
    "median and largest over experts, and the smallest share of a block's routed tokens that one expert saw."
)


def intervals(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows by method of the differences from 16 bit in right answers."""
    if summary["benchmark"] != MOE_OMNI:
        return [], []
    rows, columns = [], []
    for name, method in summary["methods"].items():
        kinds = {kind: row for kind, row in method["kinds"].items() if "difference" in row}
        columns = columns or list(kinds)
        rows += [[name, *(_points(row) for row in kinds.values())]] if kinds else []
    return ["method", *columns], rows


def _points(row: Mapping[str, Any]) -> str:
    low, high = (float("nan") if bound is None else 100 * bound for bound in row["difference_interval"])
    return f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows by method; no row for a method without such errors."""
    rows = []
    for name, method in summary["methods"].items():
        lists = method.get(EXPERT_ERRORS, {}).values()
        errors = [error for found in lists for error in found["error"] if error is not None]
        if errors and max(errors) > 0:
            least = min(min(found["tokens"]) / sum(found["tokens"]) for found in lists)
            count = sum(len(found["tokens"]) for found in lists)
            figures = [f"{100 * median(errors):.2f}", f"{100 * max(errors):.2f}", f"{least:.1%}"]
            rows.append([name, f"{len(errors)} of {count}", *figures])
    return ["method", "experts with tokens", "median", "largest", "smallest share"], rows
