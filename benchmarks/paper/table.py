"""The paper's rows and ours, as JSON and as Markdown.

The paper: arXiv 2606.04349, its table of Qwen2.5-Omni-3B. It publishes no intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper.plan import duration, gigabytes
from benchmarks.paper.prompts import OWN, PAPER
from benchmarks.paper.questions import BENCHMARKS, IMAGE
from benchmarks.paper.rows import FRAMES

CITATION = "arXiv 2606.04349, Table"
PAPER_MODEL = "Qwen2.5-Omni-3B"
# Method, bits of weights and activations, per cent by benchmark in the order of BENCHMARKS.
PUBLISHED = (
    ("FP16", "16/16", (79.39, 44.78, 57.33, 66.25)),
    ("QLoRA", "4/16", (75.88, 43.56, 54.78, 64.12)),
    ("naive", "4/4", (73.17, 40.00, 47.52, 63.40)),
    ("Q-VLM", "4/4", (73.85, 40.33, 48.41, 63.71)),
    ("PoMQ-ViT", "4/4", (75.36, 42.11, 49.22, 64.17)),
    ("MorphoQuant", "4/4", (76.63, 45.11, 54.33, 65.09)),
)
NOTES = (
    f"Rows with a citation are the paper's ({CITATION}), of {PAPER_MODEL}, as it publishes them: without intervals. "
    "Its W4A4 rows keep weights in a 4-bit float format (NF4).",
    "The paper does not state its prompts and rules of scoring. Compare the rows that were asked here with each other "
    "first: a difference to the paper's rows may come from prompts, rules, frames and calibration samples.",
    f"Video-MME: overall, without subtitles. Servers that were started here take {FRAMES} frames, unless "
    "--serve-arguments says otherwise; one given by its URL has its own settings.",
    "The paper's figures of ScienceQA, MMMU and Video-MME can be shares of all questions, but not of those with an "
    "image or with choices alone. That its AIR-Bench is Foundation, and not Chat, is by the public copy of its code.",
    "Responses without an answer and refused requests count as not right.",
)
# By the option --prompts.
PROMPTS = {
    OWN: "Prompts and rules are those of each benchmark's authors; ScienceQA's are lmms-eval's.",
    PAPER: "Prompts, numbers of tokens and rules are those of a public copy of the paper's code. It compares one "
    "letter, so nearly all of MMMU's open questions are wrong by it.",
}


def paper_rows() -> list[dict[str, Any]]:
    """The paper's rows as the result holds them."""
    return [
        {"name": name, "bits": bits, "source": CITATION, "accuracy": dict(zip(BENCHMARKS, figures, strict=True))}
        for name, bits, figures in PUBLISHED
    ]


def render(result: Mapping[str, Any]) -> str:
    """The result as Markdown: the paper's table with our rows, their costs, and notes about the figures."""
    names = result["benchmarks"]
    titles = [BENCHMARKS[name].reader.NAME.removesuffix(" Foundation") for name in names]
    lines = _table(
        ["method", "W/A", *titles, "source"],
        [
            *([row["name"], row["bits"], *_paper_cells(row, names), row["source"]] for row in result["paper"]),
            *([row["name"], row["bits"], *_cells(row, names), row["source"]] for row in result["rows"]),
        ],
    )
    lines += ["", "Per cent right, with 95 % intervals (Wilson) in the rows that were asked here.", ""]
    lines += _table(
        ["row", "weights", "escape rate", "calibrated in", "asked in", "questions", "unparsed", "refused"],
        [_cost(row, names) for row in result["rows"]],
    )
    found = [*image_notes(result["rows"], names), *rule_notes(result["rows"], names)]
    notes = [*NOTES, *found, *result["notes"]]
    return "\n".join([f"# {result['title']}", "", *lines, "", *(f"- {note}" for note in notes), ""])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    every = [list(headings), ["---"] * len(headings), *map(list, rows)]
    return [f"| {' | '.join(cells)} |" for cells in every]


def _paper_cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{row['accuracy'][name]:.2f}" for name in names]


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        found = row["benchmarks"][name]["all"]
        low, high = found["interval"]
        cells.append(f"{100 * found['accuracy']:.2f} ({100 * low:.2f} to {100 * high:.2f})")
    return cells


def _cost(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    found = [row["benchmarks"][name] for name in names]
    counts = [str(sum(one["all"][key] for one in found)) for key in ("answered", "unparsed", "refused")]
    size, rate, seconds = row.get("bytes"), row.get("escape_rate"), row.get("calibration_seconds")
    return [
        row["name"],
        "-" if size is None else gigabytes(size),
        "-" if rate is None else f"{100 * rate:.2f} %",
        "-" if seconds is None else duration(seconds),
        duration(sum(one["seconds"] for one in found)),
        *counts,
    ]


def image_notes(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """ScienceQA's other usual figure, of its questions with an image; none if those alone were asked."""
    if "scienceqa" not in names:
        return []
    found = {row["name"]: row["benchmarks"]["scienceqa"]["by"]["modality"] for row in rows}
    figures = [
        f"{name} {100 * by['text+image']['accuracy']:.2f}" for name, by in found.items() if {*by} > {"text+image"}
    ]
    return [f"ScienceQA's questions with an image alone: {', '.join(figures)}."] if figures else []


def rule_notes(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The same responses by the rule of the paper's code, where that differs."""
    lines = []
    for row in rows:
        found = {name: row["benchmarks"][name] for name in names}
        other = [
            f"{BENCHMARKS[name].reader.NAME} {100 * one['paper_rule']['accuracy']:.2f}"
            for name, one in found.items()
            if one["paper_rule"]["right"] != one["all"]["right"]
        ]
        if other:
            lines.append(f"{row['name']}, by the rule of the paper's code: {', '.join(other)}.")
    return lines


def notes(options: Any, sources: Mapping[str, Any], calibration: str) -> list[str]:
    """Notes about the settings of this run."""
    subset = "the questions of test with an image" if options.scienceqa == IMAGE else "all questions of test"
    found = [
        PROMPTS[options.prompts],
        f"ScienceQA: {subset}.",
        calibration[:1].upper() + calibration[1:] + ".",
    ]
    held = {name: len(media) for name, media in sources.get("held_out", {}).items() if media}
    if held:
        counts = ", ".join(f"{count} of {name}" for name, count in held.items())
        found.append(f"Media held out for calibration, and their questions left out of every row: {counts}.")
    if options.limit is not None:
        found.append(f"A trial: only the first {options.limit} questions of each benchmark were asked.")
    return found
