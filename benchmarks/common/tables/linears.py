"""The table of a result of benchmarks.gpu_linear: times of linears over bf16. Pure."""

from __future__ import annotations

from typing import Any

Point = tuple[str, int]


def by_point(rows: list[dict[str, Any]]) -> dict[Point, dict[str, dict[str, Any]]]:
    """Entries of a result by (layer, M), then by method, in the order of their measurement."""
    points: dict[Point, dict[str, dict[str, Any]]] = {}
    for row in rows:
        points.setdefault((row["layer"], row["M"]), {})[row["method"]] = row
    return points


def cells(found: dict[str, dict[str, Any]]) -> list[str]:
    """Cells of one layer and number of tokens, by method: µs, ratio to bf16 and the host's µs, or why it is skipped."""
    base = found.get("bf16", {}).get("us")
    made = []
    for row in found.values():
        time = row.get("us")
        ratio = f" ({base / time:.2f}x)" if time and base else ""
        # Results of earlier releases lack the host's time.
        host = f", host {row['host_us']:.0f}" if "host_us" in row else ""
        made.append(f"{time:.1f}{ratio}{host}" if time else row["skipped"])
    return made


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a row for each layer and number of tokens, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return [
        f"| layer | M | {' | '.join(methods)} |",
        "|---" * (len(methods) + 2) + "|",
        *(f"| {layer} | {tokens} | {' | '.join(cells(found))} |" for (layer, tokens), found in by_point(rows).items()),
    ]
