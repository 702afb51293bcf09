"""The figures of a comparison as a JSON object, a table for a terminal and an HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from calibration.compare.measure import Comparison
from morphoquant_vllm.errors import MorphoQuantError, one_line
from morphoquant_vllm.format.schema import DEFAULT_ROWS

MEANING = (
    "perplexity: of the text tokens of the data. KL: mean divergence of the second model's next token from the "
    "first's, in nats. same: tokens for which both find the same one likeliest. error: root mean square error of a "
    "decoder block's output, relative to the first model's."
)


def comparison_data(first: Path, second: Path, comparison: Comparison) -> dict[str, Any]:
    """The JSON object of a comparison. Raises MorphoQuantError if no text token was predicted."""
    if not comparison.groups:
        raise MorphoQuantError("the data predict no text token; give conversations with answers")
    order = [name for name in ("all", *DEFAULT_ROWS) if name in comparison.groups]
    return {
        "first": _name(first),
        "second": _name(second),
        "modalities": {name: comparison.groups[name].figures() for name in order},
        "blocks": comparison.relative_errors(),
    }


def _name(directory: Path) -> str:
    return one_line(Path(os.path.realpath(directory)).name, 100)


def comparison_table(data: dict[str, Any]) -> RenderableType:
    """A table by modality, and one by decoder block."""
    by_modality = _table("samples with", "samples", "tokens", "perplexity\n1st", "2nd", "KL", "same")
    for name, row in data["modalities"].items():
        by_modality.add_row(name, f"{row['samples']:.0f}", f"{row['tokens']:.0f}", *_figures(row))
    by_block = _table("block", "error")
    for index, error in enumerate(data["blocks"]):
        by_block.add_row(str(index), f"{error:.4f}")
    heading = Text(f"1st: {data['first']}\n2nd: {data['second']}")
    return Lines(heading, by_modality, by_block, Text(MEANING))


def _figures(row: dict[str, float]) -> list[str]:
    perplexities = (row["first_perplexity"], row["second_perplexity"])
    return [*(f"{value:.4g}" for value in perplexities), f"{row['divergence']:.5f}", f"{row['agreement']:.1%}"]


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return table


def render(data: dict[str, Any]) -> str:
    """The self-contained HTML page."""
    environment = Environment(
        loader=PackageLoader("calibration.compare", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    finite: Sequence[float] = [error for error in data["blocks"] if error == error]
    rows = {name: _figures(row) for name, row in data["modalities"].items()}
    page = environment.get_template("compare.html.j2")
    return page.render(data=data, rows=rows, largest=max(finite, default=0.0) or 1.0, meaning=MEANING)
