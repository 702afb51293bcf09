"""The errors of experts in a table."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.accuracy.omni import EXPERT_ERRORS

CAPTION = (
    "Error of an expert's output over the tokens that chose it, in % of the 16-bit output's norm, on 16-bit inputs: "
    "median and largest over experts, and the smallest share of a block's routed tokens that one expert saw."
)


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
