"""The figures as JSON, as a short Markdown summary and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import plots
from benchmarks.common.files import write_results
from benchmarks.common.machine import stated_load
from benchmarks.cpu_experts.ways import BFLOAT16

# Least times bf16 by the number of tokens, and the largest share of its memory.
SPEED_BARS, MEMORY_BAR = {1: 3.0, 4: 3.0, 64: 3.0, 512: 1.8}, 0.33


def write(summary: dict[str, Any], directory: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.png; return their paths."""
    return write_results(directory, name, summary, markdown(summary), plot(summary))


def markdown(summary: dict[str, Any]) -> str:
    """The command, the machine and its load, the memory, and the times; figures that miss a bar are bold."""
    layer = summary["layer"]
    points = summary["points"]
    parts = [
        "# Routed experts on a CPU",
        f"`{summary['command']}`, {summary['seconds']:.0f} s. {summary['machine']}; ours {summary['instructions']}, "
        f"vLLM's isa `{summary['isa']}`. {summary['threads']} thread(s), OMP_WAIT_POLICY {summary['wait_policy']}. "
        f"Load average at start {stated_load(summary)}.",
        f"One layer of {layer['name']}: {layer['experts']} experts, {layer['chosen']} of each token, "
        f"K = {layer['hidden']}, I = {layer['between']}. Medians (quartiles) of interleaved calls in ms, and times "
        "bf16. Every round has fresh routing. Quantization, sorting and the weighted sum are included.",
    ]
    heading = ["", "memory", *(f"M = {point['tokens']}" for point in points), "bars met"]
    lines = [_row(heading), "|---" * len(heading) + "|"]
    for way in summary["bytes"]:
        share = summary["bytes"][way] / summary["bytes"][BFLOAT16]
        met = [way == BFLOAT16 or share <= MEMORY_BAR]
        cells = [way, f"{summary['bytes'][way] / 1e6:.0f} MB ({share:.3f})"]
        for point in points:
            taken = point["times"][way]
            ratio = point["times"][BFLOAT16]["median"] / taken["median"]
            met.append(way == BFLOAT16 or ratio >= SPEED_BARS.get(point["tokens"], 0))
            spread = f"{taken['low'] * 1e3:.2f}-{taken['high'] * 1e3:.2f}"
            cells.append(f"{taken['median'] * 1e3:.2f} ({spread}), {ratio:.2f} x" + ("" if met[-1] else " **missed**"))
        lines.append(_row([*cells, "" if way == BFLOAT16 else "yes" if all(met) else "**no**"]))
    bars = ", ".join(f"{bar} x at M = {tokens}" for tokens, bar in SPEED_BARS.items())
    read = ", ".join(f"{point['experts_read']:.0f} at M = {point['tokens']}" for point in points)
    others = ", ".join(f"{point['others']:.2f} at M = {point['tokens']}" for point in points)
    parts += [
        "\n".join(lines),
        f"Bars: {bars}; memory at most {MEMORY_BAR} x bf16. Experts read by a call: {read}. "
        f"Cores that other processes took meanwhile: {others}.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(summary: dict[str, Any]) -> bytes:
    """Time against tokens, as PNG; MorphoQuantError without matplotlib."""
    figure, grid = plots.panels(1, 1, (7, 4))
    axes, points = grid[0, 0], summary["points"]
    for way in summary["bytes"]:
        times = [point["times"][way]["median"] * 1e3 for point in points]
        axes.plot([point["tokens"] for point in points], times, marker="o", label=way)
    title = f"experts of {summary['layer']['name']}, {summary['threads']} thr."
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=title)
    axes.legend(fontsize=7)
    return plots.png(figure)
