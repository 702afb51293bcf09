"""Summarises the measured linears for each decision: means and ratios over the comparable linears."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.decisions.layers import CENTRES, Result, Variant

DEFAULT = Variant()


def mean(values: Iterable[float]) -> float:
    """Geometric mean: errors of linears differ by factors."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def compare(results: Sequence[Result], variant: Variant, base: Variant = DEFAULT) -> dict[str, Any]:
    """Mean error of the linears measured in both ways, and how many times that of `base` it is: mean and extremes."""
    errors = {(result.layer, result.variant): result.error for result in results}
    layers = [result.layer for result in results if result.variant == variant and (result.layer, base) in errors]
    ratios = [errors[layer, variant] / errors[layer, base] for layer in layers]
    return {
        "linears": len(layers),
        "error": mean(errors[layer, variant] for layer in layers),
        "ratio": {"mean": mean(ratios), "least": min(ratios), "most": max(ratios)},
    }


def scales(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Decision 1: every group size and scale scheme against groups of 32 with free scales."""
    return [
        {
            "group_size": variant.group_size,
            "scale_levels": variant.scale_levels,
            **compare(results, variant),
            # The cost of levels at the same group size.
            "levels_ratio": compare(results, variant, Variant(group_size=variant.group_size))["ratio"],
        }
        for variant in _variants(results)
        if (variant.centre, variant.massive_row) == (DEFAULT.centre, DEFAULT.massive_row)
    ]


def centres(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Decision 2: by input, and of all together, the other centres against real-valued ones."""
    return [
        {
            "input": name,
            "centred_share": _default(own)[0].centred_share if name != "all" else None,
            "error": compare(own, DEFAULT)["error"],
            "ratio": {kind: compare(own, Variant(centre=kind))["ratio"] for kind in CENTRES if kind != DEFAULT.centre},
        }
        for name, own in [*_by_input(results), ("all", list(results))]
    ]


def massive(results: Sequence[Result], held_out_tokens: int) -> list[dict[str, Any]]:
    """Decision 3: by input, errors of massive tokens and of the others with and without the row."""
    without = Variant(massive_row=False)
    table = []
    for name, own in _by_input([result for result in results if result.massive_error is not None]):
        plain = [result for result in own if result.variant == without]
        if not plain:
            continue
        with_row = _default(own)
        first = with_row[0]
        table.append(
            {
                "input": name,
                "massive_tokens": first.massive_tokens,
                "share": first.massive_tokens / held_out_tokens,
                "found": first.found,
                "false": first.false,
                "massive_error": {"on": _massive_mean(with_row), "off": _massive_mean(plain)},
                "other_error": {"on": mean(r.error for r in with_row), "off": mean(r.error for r in plain)},
            }
        )
    return table


def _variants(results: Sequence[Result]) -> list[Variant]:
    return sorted({r.variant for r in results}, key=lambda v: (v.group_size, v.scale_levels))


def _by_input(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.input_name, []).append(result)
    return list(groups.items())


def _default(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.variant == DEFAULT]


def _massive_mean(results: Sequence[Result]) -> float:
    return mean(result.massive_error for result in results if result.massive_error is not None)
