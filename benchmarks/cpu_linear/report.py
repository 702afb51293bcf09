"""The figures as JSON, as Markdown tables and as a plot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cache import write_atomically
from morphoquant_vllm.errors import MorphoQuantError

BASE, INTEGER_BASE = "oneDNN bf16", "oneDNN W8A8"


def write(summary: dict[str, Any], directory: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, for linears and heads, NAME.png; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.json", directory / f"{name}.md"]
    write_atomically(paths[0], json.dumps(summary, indent=1) + "\n")
    write_atomically(paths[1], markdown(summary))
    if cases := summary["linears"] + summary["heads"]:
        paths.append(directory / f"{name}.png")
        paths[2].write_bytes(plot(cases))
    return paths


def markdown(summary: dict[str, Any]) -> str:
    """Tables with the command, the machine and its load."""
    parts = [
        "# Linear layers on a CPU",
        f"`{summary['command']}`, {summary['seconds']:.0f} s. {summary['machine']}; {summary['instructions']}. "
        f"Load average at start {summary['load']:.1f}{', a contended machine' if summary['contended'] else ''}. "
        "Times are medians (quartiles) of interleaved calls in one process, activation quantization included; the "
        "weights of small layers stay in the cache between calls, for all ways alike.",
    ]
    for threads, ceiling in summary["ceilings"].items():
        parts.append(
            f"Ceilings with {threads} thread(s): memory read {ceiling['gb_s']:.1f} GB/s, byte dot products "
            f"{ceiling['gmac_s']:.0f} G multiply-adds/s."
        )
    for case in summary["linears"] + summary["heads"]:
        parts.append(f"## {case['layer']}, N = {case['outputs']}, K = {case['channels']}, {case['threads']} thread(s)")
        parts += [f"M = {point['tokens']}\n\n{_table(case, point)}" for point in case["points"]]
    if summary["rows"]:
        parts.append("## Modality rows mixed in the batch, against one row for all tokens")
        lines = [
            "| N x K | G | M | threads | pairs | one row | mixed | ratio (95 %) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['outputs']}x{row['channels']} | {row['group_size']} | {row['tokens']} | {row['threads']} | "
            f"{row['pairs']} | {row['single'] * 1e6:.0f} µs | {row['mixed'] * 1e6:.0f} µs | {row['ratio']:.3f} "
            f"({row['low']:.3f}-{row['high']:.3f}) |"
            for row in summary["rows"]
        ]
        parts.append("\n".join(lines))
    if summary["pages"]:
        parts.append("## Weights in large pages, against pages of 4 KiB")
        lines = [
            "| N x K | G | M | threads | pairs | small | large | small / large |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['outputs']}x{row['channels']} | {row['group_size']} | {row['tokens']} | {row['threads']} | "
            f"{row['pairs']} | {row['small'] * 1e6:.0f} µs | {row['large'] * 1e6:.0f} µs | {row['ratio']:.2f} |"
            for row in summary["pages"]
        ]
        parts.append("\n".join(lines))
    if summary["left_out"]:
        parts.append("Not measured here:\n\n" + "\n".join(f"- {reason}" for reason in summary["left_out"]))
    return "\n\n".join(parts) + "\n"


def _table(case: dict[str, Any], point: dict[str, Any]) -> str:
    bases = [point["times"].get(base) for base in (BASE, INTEGER_BASE)]
    against = " | ".join(f"against {base}" for base in (BASE, INTEGER_BASE))
    lines = [f"| | µs (quartiles) | {against} | weights GB/s | G multiply-adds/s |", "|---|---|---|---|---|---|"]
    for name, taken in point["times"].items():
        ratio = " | ".join(f"{base['median'] / taken['median']:.2f}x" if base else "" for base in bases)
        rate = point["weight_bytes"][name] / taken["median"] / 1e9
        work = case["outputs"] * case["channels"] * point["tokens"] / taken["median"] / 1e9
        lines.append(
            f"| {name} | {taken['median'] * 1e6:.0f} ({taken['low'] * 1e6:.0f}-{taken['high'] * 1e6:.0f}) | {ratio} | "
            f"{rate:.1f} | {work:.1f} |"
        )
    return "\n".join(lines)


def plot(cases: list[dict[str, Any]]) -> bytes:
    """Time against tokens, a panel per layer and number of threads, as PNG; MorphoQuantError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MorphoQuantError(
            f"the Python package '{error.name}' is missing, which draws the plots; pip install matplotlib"
        ) from error
    figure = Figure(figsize=(7, 3.4 * len(cases)), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        tokens = [point["tokens"] for point in case["points"]]
        for name in case["points"][0]["times"]:
            axes.plot(
                tokens, [point["times"][name]["median"] * 1e3 for point in case["points"]], marker="o", label=name
            )
        axes.set(
            xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"{case['layer']}, {case['threads']} thr."
        )
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
