"""The result as a Markdown table. Pure."""

from __future__ import annotations

from typing import Any

from benchmarks.common.machine import stated_load


def markdown(result: dict[str, Any]) -> str:
    """Versions and a line for each layer and number of tokens."""
    lines = [
        "# Host cost of a call of a GPU layer, without Triton's launcher and the driver",
        "",
        f"`python -m benchmarks.gpu_host`; {result['machine']}, Triton {result['versions']['triton']}; load "
        f"{stated_load(result)}. Microseconds; in brackets the number of Python functions called.",
        "",
        "| layer | scales | M | launches | through Triton's JIT | bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = [f"{row[way]['us']:.1f} ({row[way]['python_calls']})" for way in ("jit", "bound")]
        scales = "two-level" if row["two_level"] else "group"
        lines.append(f"| {row['layer']} | {scales} | {row['M']} | {row['launches']} | {times[0]} | {times[1]} |")
    return "\n".join(lines) + "\n"
