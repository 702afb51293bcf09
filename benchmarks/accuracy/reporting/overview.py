"""One table of all methods and all models: the loss of each against 16 bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.accuracy.reporting import report
from benchmarks.common.files import write_results

NAME = "overview"
# In cells of methods that a model cannot have.
NONE = "-"
CAPTION = (
    "Perplexity over that of 16 bit, all texts together, ± standard error over windows; of the omni model the "
    "divergence from 16 bit (KL, thousandths of a nat per token of the right answer) ± standard error over questions, "
    "and points of exact answers lost, with the paired 95 % interval. Escapes or bypass: the highest of the models."
)


def overview(
    summaries: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    left_out: Mapping[str, Mapping[str, str]],
    command: str,
) -> dict[str, Any]:
    """The table as JSON, by method and benchmark, from `summaries` by benchmark.

    `left_out`: by benchmark, the methods that its model cannot have, with the reason.
    """
    return {
        "command": command,
        "models": {name: summary["model"] for name, summary in summaries.items()},
        "machine": {name: summary["machine"] for name, summary in summaries.items()},
        "methods": {
            method: {
                name: _cell(summary["methods"][method])
                for name, summary in summaries.items()
                if method in summary["methods"]
            }
            for method in methods
        },
        "left_out": {name: dict(reasons) for name, reasons in left_out.items() if reasons},
    }


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The methods that are left out, by the reason."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def _cell(method: Mapping[str, Any]) -> dict[str, Any]:
    activations = method["activations"]
    beyond = None if activations is None else activations["rate"]
    if "kinds" in method:
        return {**method["kinds"]["all"], "beyond": beyond}
    return {"against_16bit": method["against_16bit"], "beyond": beyond}


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows. A cell that was not measured is empty; a method that the model cannot have has a dash."""
    header = ["method"]
    for name in found["models"]:
        header += ["omni KL", "omni points lost"] if name == "omni" else [name]
    rows = []
    for method, cells in found["methods"].items():
        row = [method]
        for name in found["models"]:
            cell = cells.get(name, {})
            cells_of_model = _omni(cell) if name == "omni" else [report.times(cell.get("against_16bit"))]
            missing = method not in cells and method in found["left_out"].get(name, {})
            row += [NONE] * len(cells_of_model) if missing else cells_of_model
        rates = [cell["beyond"] for cell in cells.values() if cell["beyond"] is not None]
        rows.append([*row, f"{max(rates):.2%}" if rates else ""])
    return [*header, "beyond 4 bits"], rows


def _omni(cell: Mapping[str, Any]) -> list[str]:
    divergence = report.milli(cell, "divergence") if "divergence" in cell else ""
    if "difference_interval" not in cell:
        return [divergence, ""]
    low, high = (-100 * bound if bound is not None else float("nan") for bound in cell["difference_interval"][::-1])
    return [divergence, f"{-100 * cell['difference']:.2f} ({low:.2f} to {high:.2f})"]


def notes(found: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown that say why cells have a dash."""
    lines = [
        f"- {benchmark}, {', '.join(f'`{name}`' for name in names)}: {reason}"
        for benchmark, reasons in found["left_out"].items()
        for reason, names in by_reason(reasons).items()
    ]
    return ["", f"Left out ({NONE}):", "", *lines] if lines else []


def write(found: Mapping[str, Any], directory: Path) -> None:
    """Write overview.json and overview.md into `directory`."""
    lines = ["# Accuracy: all methods, all models", "", CAPTION, "", f"`{found['command']}`", ""]
    lines += [*report.lines_of(*table(found)), *notes(found)]
    write_results(directory, NAME, found, "\n".join(lines) + "\n")


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    report.show_table(CAPTION, *table(found), console)
