"""The result as Markdown. Pure."""

from __future__ import annotations

import math
from typing import Any


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Losses over that of the fixed damping."""
    return {name: loss / row["losses"]["fixed"] for name, loss in row["losses"].items() if name != "fixed"}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means of the ratios over inputs of the same K and as many tokens."""
    found: dict[tuple[int, int], list[dict[str, float]]] = {}
    for row in rows:
        found.setdefault((row["in_features"], row["tokens"]), []).append(ratios(row))
    return [
        {
            "in_features": in_features,
            "tokens": tokens,
            "inputs": len(parts),
            "ratios": {name: math.exp(sum(math.log(part[name]) for part in parts) / len(parts)) for name in parts[0]},
        }
        for (in_features, tokens), parts in sorted(found.items())
    ]


def markdown(result: dict[str, Any]) -> str:
    """The command, a line for each K and number of tokens, and one for each input."""
    strengths = list(result["means"][0]["ratios"])
    lines = [
        "# Damping of the rounding",
        "",
        f"`{result['command']}`; {result['machine']}; {result['model']}; {result['judging_tokens']} tokens judge.",
        "",
        f"Error of rounded weights on other tokens, over that with a damping of {result['fixed']:g}. The columns are "
        "strengths: the damping is strength * K / tokens. Means are geometric.",
        "",
        "| K | tokens | K / tokens | inputs | " + " | ".join(strengths) + " |",
        "|" + "---|" * (4 + len(strengths)),
    ]
    for mean in result["means"]:
        share = mean["in_features"] / mean["tokens"]
        cells = [f"{mean['in_features']}", f"{mean['tokens']}", f"{share:.3f}", f"{mean['inputs']}"]
        lines.append("| " + " | ".join(cells + [f"{mean['ratios'][name]:.3f}" for name in strengths]) + " |")
    lines += ["", "| input | K | tokens | error | " + " | ".join(strengths) + " |", "|" + "---|" * (4 + len(strengths))]
    for row in result["rows"]:
        cells = [row["input"], f"{row['in_features']}", f"{row['tokens']}", f"{row['losses']['fixed']:.5f}"]
        lines.append("| " + " | ".join(cells + [f"{ratios(row)[name]:.3f}" for name in strengths]) + " |")
    return "\n".join(lines) + "\n"
