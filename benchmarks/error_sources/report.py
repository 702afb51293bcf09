"""The result as Markdown. Pure."""

from __future__ import annotations

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The command, and a line for each input."""
    first = result["rows"][0]
    pulls = [f"pull {pull}" for pull in first["pulls"]]
    strengths = [f"strength {strength}" for strength in first["strengths"]]
    head = ["input", "K", "before", "own", "served", "plain", *pulls, *strengths]
    lines = [
        "# Sources of the errors of linears",
        "",
        f"`{result['command']}`; {result['machine']}; {result['model']}, fitted to {first['tokens']:.0f} tokens, "
        f"measured on {result['held_out_tokens']} others.",
        "",
        "Squared error of the outputs over that of the 16-bit outputs, in thousandths. before: by earlier layers. own: "
        "by rounding this input. served: all, as served. The others have unrounded weights: W times the step (plain), "
        "fits with a fixed pull, and fits with a pull of strength * K / tokens.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in result["rows"]:
        errors = (row["before"], row["own"], row["served"], row["plain"])
        cells = [f"{1000 * value:.2f}" for value in (*errors, *row["pulls"].values(), *row["strengths"].values())]
        lines.append("| " + " | ".join([row["input"], str(row["in_features"]), *cells]) + " |")
    return "\n".join(lines) + "\n"
