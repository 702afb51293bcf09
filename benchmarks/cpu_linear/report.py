"""The figures as JSON, as a short Markdown summary, as tables of all figures and as a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import plots
from benchmarks.common.files import write_atomically, write_results
from benchmarks.common.machine import stated_load

BASE, INTEGER_BASE = "oneDNN bf16", "oneDNN W8A8"


def write(summary: dict[str, Any], directory: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, for linears and heads, NAME.png and NAME-tables.md; return their paths."""
    cases = _cases(summary)
    paths = write_results(directory, name, summary, markdown(summary, name), plot(cases) if cases else None)
    if cases:
        paths.append(directory / f"{name}-tables.md")
        write_atomically(paths[-1], tables(summary))
    return paths


def markdown(summary: dict[str, Any], name: str) -> str:
    """The command, the machine and its load, and a table for each layer; `name` is that of the files."""
    parts = _head(summary)
    if _cases(summary):
        parts.append(
            f"Cells: median µs, and times faster than {BASE} / than {INTEGER_BASE}. Quartiles and rates: "
            f"`python -m benchmarks.cpu_linear report --name {name}` writes them to `{name}-tables.md`, and a plot."
        )
    for case in _cases(summary):
        parts += [_title(case), _overview(case)]
    parts += _rows(summary.get("rows", [])) + _pages(summary.get("pages", []))
    parts += _instruction_sets(summary.get("instruction_sets", []))
    if summary["left_out"]:
        parts.append("Not measured here:\n\n" + "\n".join(f"- {reason}" for reason in summary["left_out"]))
    return "\n\n".join(parts) + "\n"


def tables(summary: dict[str, Any]) -> str:
    """A table for each layer and number of tokens: quartiles, ratios, rates."""
    parts = _head(summary)
    for case in _cases(summary):
        parts.append(_title(case))
        parts += [f"M = {point['tokens']}\n\n{_table(case, point)}" for point in case["points"]]
    return "\n\n".join(parts) + "\n"


def _cases(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Linears and heads; results that are older than a part do not have it."""
    return [*summary.get("linears", []), *summary.get("heads", [])]


def _head(summary: dict[str, Any]) -> list[str]:
    ceilings = [
        f"Ceilings with {threads} thread(s): memory read {ceiling['gb_s']:.1f} GB/s, byte dot products "
        f"{ceiling['gmac_s']:.0f} G multiply-adds/s."
        for threads, ceiling in summary["ceilings"].items()
    ]
    return [
        "# Linear layers on a CPU",
        f"`{summary['command']}`, {summary['seconds']:.0f} s. {summary['machine']}; {summary['instructions']}. "
        f"Load average at start {stated_load(summary)}. "
        "Times are medians (quartiles) of interleaved calls in one process, activation quantization included; the "
        "weights of small layers stay in the cache between calls, for all ways alike.",
        *ceilings,
    ]


def _title(case: dict[str, Any]) -> str:
    return f"## {case['layer']}, N = {case['outputs']}, K = {case['channels']}, {case['threads']} thread(s)"


def _ratios(point: dict[str, Any], way: str) -> list[str]:
    """How many times faster than each base, or nothing if the base was not measured."""
    bases = [point["times"].get(base) for base in (BASE, INTEGER_BASE)]
    return [f"{base['median'] / point['times'][way]['median']:.2f}" if base else "" for base in bases]


def _overview(case: dict[str, Any]) -> str:
    def cell(point: dict[str, Any], way: str) -> str:
        against = " / ".join(ratio for ratio in _ratios(point, way) if ratio)
        return f"{point['times'][way]['median'] * 1e6:.0f}" + (f" ({against})" if against else "")

    columns = " | ".join(f"M = {point['tokens']}" for point in case["points"])
    lines = [f"| | {columns} |", "|---" * (len(case["points"]) + 1) + "|"]
    for way in case["points"][0]["times"]:
        lines.append(f"| {way} | " + " | ".join(cell(point, way) for point in case["points"]) + " |")
    return "\n".join(lines)


def _table(case: dict[str, Any], point: dict[str, Any]) -> str:
    against = " | ".join(f"against {base}" for base in (BASE, INTEGER_BASE))
    lines = [f"| | µs (quartiles) | {against} | weights GB/s | G multiply-adds/s |", "|---|---|---|---|---|---|"]
    for name, taken in point["times"].items():
        ratio = " | ".join(f"{found}x" if found else "" for found in _ratios(point, name))
        rate = point["weight_bytes"][name] / taken["median"] / 1e9
        work = case["outputs"] * case["channels"] * point["tokens"] / taken["median"] / 1e9
        lines.append(
            f"| {name} | {taken['median'] * 1e6:.0f} ({taken['low'] * 1e6:.0f}-{taken['high'] * 1e6:.0f}) | {ratio} | "
            f"{rate:.1f} | {work:.1f} |"
        )
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    title = "## Modality rows mixed in the batch, against one row for all tokens"

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        ratio = f"{row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
        return f"{row['single'] * 1e6:.0f} µs", f"{row['mixed'] * 1e6:.0f} µs", ratio

    return _compared(rows, title, ("one row", "mixed", "ratio (95 %)"), cells)


def _pages(rows: list[dict[str, Any]]) -> list[str]:
    title = "## Weights in large pages, against pages of 4 KiB"

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return f"{row['small'] * 1e6:.0f} µs", f"{row['large'] * 1e6:.0f} µs", f"{row['ratio']:.2f}"

    return _compared(rows, title, ("small", "large", "small / large"), cells)


def _instruction_sets(cases: list[dict[str, Any]]) -> list[str]:
    title = "## Instruction sets, two-level scales"
    names = list(cases[0]["times"]) if cases else []

    def cells(case: dict[str, Any]) -> tuple[str, ...]:
        base = case["times"]["avx2"]["median"]
        medians = {name: case["times"][name]["median"] for name in names}
        return tuple(f"{median * 1e6:.0f} µs ({base / median:.2f})" for median in medians.values())

    return _compared(cases, title, tuple(f"{name} (times as fast as avx2)" for name in names), cells)


def _compared(
    rows: list[dict[str, Any]],
    title: str,
    headings: tuple[str, ...],
    cells: Callable[[dict[str, Any]], tuple[str, ...]],
) -> list[str]:
    """The title and a table of calls in turn, or nothing if none were measured."""
    if not rows:
        return []
    lines = [
        f"| N x K | G | M | threads | calls of each | {' | '.join(headings)} |",
        "|---" * (5 + len(headings)) + "|",
    ]
    for row in rows:
        shape = (f"{row['outputs']}x{row['channels']}", *(row[key] for key in ("group_size", "tokens", "threads")))
        lines.append("| " + " | ".join(map(str, (*shape, row["pairs"], *cells(row)))) + " |")
    return [title, "\n".join(lines)]


def plot(cases: list[dict[str, Any]]) -> bytes:
    """Time against tokens, a panel per layer and number of threads, as PNG; MorphoQuantError without matplotlib."""
    figure, grid = plots.panels(len(cases), 1, (7, 3.4 * len(cases)))
    for axes, case in zip(grid[:, 0], cases, strict=True):
        tokens = [point["tokens"] for point in case["points"]]
        for name in case["points"][0]["times"]:
            axes.plot(
                tokens, [point["times"][name]["median"] * 1e3 for point in case["points"]], marker="o", label=name
            )
        axes.set(
            xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"{case['layer']}, {case['threads']} thr."
        )
        axes.legend(fontsize=7)
    return plots.png(figure)
