"""A measured calibration as JSON, as Markdown tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import plots
from benchmarks.common.files import write_results
from benchmarks.common.machine import stated_load

GIB = 2**30


def write(summary: dict[str, Any], directory: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.png; return their paths."""
    return write_results(directory, name, summary, markdown(summary, name), plot(summary))


def markdown(summary: dict[str, Any], name: str) -> str:
    """The measurement and its machine, the bound, memory, and a profile of the time; `name` is that of the files."""
    parts = [f"# Calibration at real size: {summary['layout']} layout", _how(summary), _figures(summary)]
    parts.append(f"Plot: `python -m benchmarks.calibrate report --name {name}`.")
    parts += [_bound(summary), _memory(summary), "## Blocks", _blocks(summary)]
    for kind, title in (("own", "Most time of their own"), ("cumulative", "Of this package, most time in all")):
        if summary["profile"].get(kind):
            parts += [f"## {title}", _profile(summary["profile"][kind])]
    return "\n\n".join(parts) + "\n"


def _how(summary: dict[str, Any]) -> str:
    return (
        f"`{summary['command']}`. {summary['machine']}; {summary['cores']} core(s) used; load average at start "
        f"{stated_load(summary)}. The model is generated ({summary['model']}); data: {summary['samples']} "
        f"samples of {summary['tokens']} tokens, {summary['media']} of them with an image and a sound; "
        f"{summary['drawn_tokens']} tokens drawn; the model runs in {summary['recipe']['dtype']}."
    )


def _figures(summary: dict[str, Any]) -> str:
    count, of = len(summary["blocks"]), summary["published_blocks"]
    rows = [
        ("a block (median of those with nothing else before them)", summary["block_seconds"]),
        ("reading the model, towers, before the first block", summary["setup_seconds"]),
        ("writing the checkpoint, after the last block", summary["after_last_block_seconds"]),
    ]
    lines = ["| | seconds |", "|---|---|", *(f"| {name} | {_seconds(value)} |" for name, value in rows)]
    kind = f"**extrapolated** from {count} of {of} blocks" if summary["extrapolated"] else f"all {of} blocks measured"
    lines.append(f"| whole calibration, {kind} | {_seconds(summary['total_seconds'])} |")
    return "\n".join(lines)


def _bound(summary: dict[str, Any]) -> str:
    work, rates = summary["work"], summary["rates"]
    lines = [
        "## The bound",
        f"Products: {rates['bfloat16'] / 1e9:.1f} GFLOP/s in bfloat16, {rates['float32'] / 1e9:.1f} in float32. A "
        f"block's operations (T = 1e12): two forwards {work['forwards'] / 1e12:.3g} T, Hessians "
        f"{work['hessians'] / 1e12:.3g} T, factorisation {work['factorisation'] / 1e12:.3g} T, GPTQ updates "
        f"{work['updates'] / 1e12:.3g} T (`benchmarks/calibrate/timing/bound.py`). Forwards and Hessians at the first "
        "rate below, the rest at the float32 rate.",
        "",
        "| rate of products | bound, a block | ratio | bound, whole | ratio |",
        "|---|---|---|---|---|",
    ]
    for dtype, bound in summary["bounds"].items():
        lines.append(
            f"| {dtype} | {bound['block']:.3g} s | {_ratio(bound['block_ratio'])} | {bound['total']:.4g} s | "
            f"{_ratio(bound['total_ratio'])} |"
        )
    return "\n".join([lines[0], "", *lines[1:]])


def _memory(summary: dict[str, Any]) -> str:
    # Kept results of earlier releases have no figure of a GPU.
    gpu = summary.get("gpu_peak", 0)
    return (f"Memory of the GPU: {gpu / GIB:.2f} GiB at most. " if gpu else "") + (
        f"Memory: {summary['anonymous_peak'] / GIB:.2f} GiB at most while blocks were worked on, without pages of "
        f"mapped weight files; {summary['peak'] / GIB:.2f} GiB with them, over the whole run. Cached inputs are "
        f"{summary['cached_inputs'] / GIB:.2f} GiB; 6 GiB and these make {summary['memory_limit'] / GIB:.2f} GiB."
    )


def _blocks(summary: dict[str, Any]) -> str:
    lines = [
        "| block | seconds | of all cores together | peak GiB, resident | without mapped files | loss |",
        "|---|---|---|---|---|---|",
    ]
    for number, block in summary["blocks"].items():
        loss = "" if block["loss"] is None else f"{block['loss']:.4f}"
        lines.append(
            # Kept results of earlier releases have no time of the cores.
            f"| {number} | {_seconds(block['seconds'])} | {_seconds(block.get('cpu'))} | "
            f"{block['resident'] / GIB:.2f} | "
            f"{block['anonymous'] / GIB:.2f} | {loss} |"
        )
    first = summary["to_first_block_seconds"]
    if first is not None:
        lines.append(f"\nThe first was done {first:.1f} s after the start, with all that comes before it.")
    return "\n".join(lines)


def _profile(rows: list[dict[str, Any]]) -> str:
    lines = ["| function | calls | own s | cumulative s |", "|---|---|---|---|"]
    lines += [f"| `{row['function']}` | {row['calls']} | {row['own']:.1f} | {row['cumulative']:.1f} |" for row in rows]
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}x"


def plot(summary: dict[str, Any]) -> bytes:
    """Seconds by block with both bounds, and memory by block, as PNG; MorphoQuantError without matplotlib."""
    figure, ((time,), (memory,)) = plots.panels(2, 1, (7, 6))
    timed = {int(number): block["seconds"] for number, block in summary["blocks"].items() if block["seconds"]}
    time.bar(timed.keys(), timed.values(), label="measured")
    for dtype, bound in summary["bounds"].items():
        style = "-" if dtype == "bfloat16" else "--"
        time.axhline(bound["block"], color="black", linestyle=style, label=f"bound, products in {dtype}")
    time.set(xlabel="block", ylabel="s", title=f"{summary['layout']} layout, {summary['cores']} cores")
    time.legend(fontsize=7)
    numbers = [int(number) for number in summary["blocks"]]
    for kind, label in (("resident", "resident"), ("anonymous", "without mapped files")):
        peaks = [block[kind] / GIB for block in summary["blocks"].values()]
        memory.plot(numbers, peaks, marker="o", label=label)
    memory.axhline(summary["memory_limit"] / GIB, color="black", label="6 GiB and cached inputs")
    memory.set(xlabel="block", ylabel="peak GiB", ylim=(0, None))
    memory.legend(fontsize=7)
    return plots.png(figure)
