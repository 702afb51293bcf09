"""Medians over rounds, and ratios taken within each round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BASES = ("bf16", "w8a8")


def lower_is_better(metric: str) -> bool:
    """Whether a smaller figure is the better one."""
    return metric.endswith(("_ms", "_bytes", "_s")) and not metric.startswith(("decode", "prompt"))


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples), "rounds": len(samples)}


def summarize(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By method: "metrics", name -> spread, and "ratios", base -> name -> spread of how many times better than it.

    `rounds` hold each method's measurements by name. A ratio is taken within a round, since its disturbances are the
    same, and is greater than 1 if the method is better than the base.
    """
    methods = list(dict.fromkeys(method for one in rounds for method in one))
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        present = [one for one in rounds if method in one]
        names = [name for name, value in present[0][method].items() if isinstance(value, int | float)]
        metrics = {name: spread([one[method][name] for one in present if name in one[method]]) for name in names}
        ratios: dict[str, dict[str, Any]] = {}
        for base in BASES:
            both = [one for one in present if base in one and base != method]
            of_base = {}
            for name in names:
                pairs = [(one[method][name], one[base][name]) for one in both if {name} <= one[base].keys()]
                values = [b / a if lower_is_better(name) else a / b for a, b in pairs if a and b]
                if values:
                    of_base[name] = spread(values)
            if of_base:
                ratios[base] = of_base
        kernels = sorted({kernel for one in present for kernel in one[method].get("kernels", ())})
        found[method] = {"metrics": metrics, "ratios": ratios, "kernels": kernels}
    return found
