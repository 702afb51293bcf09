"""The figures as JSON, as Markdown tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import plots
from benchmarks.common.files import write_results
from benchmarks.common.machine import stated_load
from benchmarks.serve.summary import BASES

# Heading and factor from the stored unit.
HEADINGS = {
    "prompt_tokens_s": ("prompt tokens/s", 1.0),
    "ttft_ms": ("time to first token (ms)", 1.0),
    "anonymous_bytes": ("memory held (GB)", 1e-9),
    "peak_bytes": ("memory at most (GB)", 1e-9),
    "device_bytes": ("weights on the GPU (GB)", 1e-9),
    "start_s": ("start (s)", 1.0),
    "load_s": ("reading weights (s)", 1.0),
}


def heading(metric: str) -> tuple[str, float]:
    """Column heading of a metric, and the factor of its values."""
    if metric.startswith("decode_tokens_s_"):
        return f"decoded tokens/s, {metric.rpartition('_')[2]} at once", 1.0
    return HEADINGS[metric]


def write(summary: dict[str, Any], directory: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, if anything was measured, NAME.png; return their paths."""
    measured = {model: found["methods"] for model, found in summary["models"].items() if found["methods"]}
    return write_results(directory, name, summary, markdown(summary, name), plot(measured) if measured else None)


def _columns(methods: dict[str, Any]) -> list[str]:
    metrics = list(dict.fromkeys(name for found in methods.values() for name in found["metrics"]))
    return [name for name in metrics if name.startswith("decode_") or name in HEADINGS]


def markdown(summary: dict[str, Any], name: str) -> str:
    """A table for each model, with the command, the machine, its load, and omissions; `name` is that of the files."""
    done = [len(found["samples"]) for found in summary["models"].values()]
    parts = [
        "# Whole engines",
        f"`{summary['command']}`, {summary['seconds']:.0f} s. {summary['machine']}; MorphoQuant serves with "
        f"{summary['backend']}. Load average at start {stated_load(summary)}.",
        f"Generated weights. `vllm bench serve` and `vllm bench throughput`, {max(done, default=0)} of "
        f"{summary['rounds']} rounds, in each of "
        "which every engine is started and asked once, in random order. Figures are medians over rounds (least to "
        "greatest); ratios are taken within rounds, and greater than 1 is better. Memory is the engine process's: "
        '"held" after all requests, without file pages; "at most" with the pages of files that are read; both with '
        f"Python and the cache of keys and values. Plot: `python -m benchmarks.serve --report --name {name}`.",
    ]
    for model, found in summary["models"].items():
        parts.append(f"## {model}")
        if found["methods"]:
            parts.append(_table(found["methods"]))
            parts += [table for base in BASES if (table := _ratios(found["methods"], base))]
            named = {name: each["kernels"] for name, each in found["methods"].items() if each["kernels"]}
            if named:
                lines = "; ".join(f"{name}: {', '.join(kernels)}" for name, kernels in named.items())
                parts.append(f"Kernels that vLLM named: {lines}.")
        if found["left_out"]:
            parts.append(
                "Not measured here:\n\n" + "\n".join(f"- {way}: {why}" for way, why in found["left_out"].items())
            )
    return "\n\n".join(parts) + "\n"


def _table(methods: dict[str, Any]) -> str:
    columns = _columns(methods)
    lines = ["| | " + " | ".join(heading(name)[0] for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, found in methods.items():
        cells = [_cell(found["metrics"].get(name), heading(name)[1]) for name in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(spread: dict[str, float] | None, factor: float = 1.0, unit: str = "") -> str:
    if spread is None:
        return ""
    low, median, high = (f"{spread[part] * factor:.4g}" for part in ("low", "median", "high"))
    return f"{median}{unit}" + (f" ({low}-{high})" if spread["rounds"] > 1 else "")


def _ratios(methods: dict[str, Any], base: str) -> str:
    shown = {method: found["ratios"][base] for method, found in methods.items() if base in found["ratios"]}
    if not shown:
        return ""
    columns = [name for name in _columns(methods) if name not in ("start_s", "load_s")]
    lines = [f"| times better than {base} | " + " | ".join(heading(name)[0] for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for method, ratios in shown.items():
        lines.append(f"| {method} | " + " | ".join(_cell(ratios.get(name), unit="x") for name in columns) + " |")
    return "\n".join(lines)


def plot(models: dict[str, Any]) -> bytes:
    """Bars for each rate, a row of panels per model, as PNG; MorphoQuantError without matplotlib."""
    panels = {
        model: [name for name in _columns(methods) if name.startswith(("decode_", "prompt_", "ttft_"))]
        for model, methods in models.items()
    }
    width = max(len(names) for names in panels.values())
    figure, grid = plots.panels(len(models), width, (3.2 * width, 2.8 * len(models)))
    for row, (model, methods) in zip(grid, models.items(), strict=True):
        for axes in row[len(panels[model]) :]:
            axes.set_axis_off()
        for axes, name in zip(row, panels[model], strict=False):
            present = {method: found["metrics"][name] for method, found in methods.items() if name in found["metrics"]}
            medians = [spread["median"] for spread in present.values()]
            below = [spread["median"] - spread["low"] for spread in present.values()]
            above = [spread["high"] - spread["median"] for spread in present.values()]
            axes.bar(range(len(present)), medians, yerr=(below, above), capsize=3)
            axes.set_xticks(range(len(present)), list(present), rotation=60, fontsize=6)
            axes.set_title(f"{model}\n{heading(name)[0]}", fontsize=8)
    return plots.png(figure)
