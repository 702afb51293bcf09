"""The medians of a result as a Markdown table. Pure."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables.linears import table


def markdown(result: dict[str, Any]) -> str:
    """Device, versions and a table of all layers."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# Linear layers on a GPU: {result['device']}, G = {result['group_size']}",
        "",
        f"`python -m benchmarks.gpu_linear --group-size {result['group_size']}`; {versions}. Median µs of rounds over "
        "all methods, in CUDA graphs, activation quantization included (times faster than bf16). Host: the CPU's time "
        "of one call without a graph until it returns, while the GPU's queue has room.",
        "",
        *table(result["rows"]),
    ]
    return "\n".join(lines) + "\n"
