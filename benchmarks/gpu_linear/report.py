"""The medians of a result as a Markdown table. Pure."""

from __future__ import annotations

from typing import Any


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


def by_point(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """Entries of a result by (layer, M), then by method, in the order of their measurement."""
    points: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        points.setdefault((row["layer"], row["M"]), {})[row["method"]] = row
    return points


def markdown(result: dict[str, Any]) -> str:
    """Device, versions and a table of all layers."""
    points = by_point(result["rows"])
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# Linear layers on a GPU: {result['device']}, G = {result['group_size']}",
        "",
        f"`python -m benchmarks.gpu_linear --group-size {result['group_size']}`; {versions}. Median µs of rounds over "
        "all methods, in CUDA graphs, activation quantization included (times faster than bf16). Host: the CPU's time "
        "of one call without a graph until it returns, while the GPU's queue has room.",
        "",
        f"| layer | M | {' | '.join(methods)} |",
        "|---" * (len(methods) + 2) + "|",
        *(f"| {layer} | {tokens} | {' | '.join(cells(found))} |" for (layer, tokens), found in points.items()),
    ]
    return "\n".join(lines) + "\n"
