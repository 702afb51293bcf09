"""The result as Markdown. Pure."""

from __future__ import annotations

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The command, and a line for 16 bit, the start and each epoch."""
    texts = list(result["exact"]["perplexity"])
    head = ["", *texts, "over 16 bit", "over the start", "divergence", "changed codes", "escapes", "CPU seconds"]
    lines = [
        "# A checkpoint that learns end to end",
        "",
        f"`{result['command']}`; {result['machine']}; {result['model']}, learning from {result['tokens']} tokens, "
        f"measured on {result['held_out_tokens']} others.",
        "",
        "Perplexity by text, and on all windows together over 16 bit's and the start's, ± its standard error over "
        "windows. divergence: mean KL divergence from 16 bit on the windows that are learned from, in an epoch as its "
        "steps saw them.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        "| 16 bit | "
        + " | ".join(f"{value:.2f}" for value in result["exact"]["perplexity"].values())
        + " | | | | | | |",
    ]
    for row in result["rows"]:
        cells = [f"{value:.2f}" for value in row["perplexity"].values()]
        cells += [f"{value:.4f} ± {error:.4f}" for value, error in (row["over_16bit"], row["over_start"])]
        cells += [f"{row['divergence']:.4f}", f"{row['changed_codes']:.2%}", f"{row['escapes']:.2%}"]
        name = f"epoch {row['epoch']}" if row["epoch"] else "start"
        lines.append("| " + " | ".join([name, *cells, f"{row['cpu_seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"
