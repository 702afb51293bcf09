"""The measured decisions as JSON and as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_results

NAME = "decisions"


def write(summary: dict[str, Any], directory: Path) -> list[Path]:
    """Write decisions.json and decisions.md into `directory`; return both paths."""
    return write_results(directory, NAME, summary, markdown(summary))


def markdown(summary: dict[str, Any]) -> str:
    """The tables, with the command and machine that made them."""
    windows = summary["windows"]
    skipped = ", ".join(summary["skipped"]) or "none"
    parts = [
        "# Format decisions, measured on single layers",
        f"`{summary['command']}`, seed {summary['seed']}, {summary['threads']} thread(s), {summary['seconds']:.0f} s. "
        f"{summary['machine']}.",
        f"Errors are of the integer layer's output, relative to the 16-bit layer's on the same held-out inputs "
        f"(root of summed squares), tokens with an outlying residual stream apart. Real inputs: {summary['model']}, "
        f"blocks {', '.join(map(str, summary['blocks']))}; calibrated on {windows['calibration']} windows and measured "
        f"on {windows['held_out']}, of {windows['tokens']} tokens, from other texts. Means over linears are geometric; "
        "in brackets the least and the most of any linear. One draw of tokens: there is no error bar over seeds.",
        "## 1. Group size and two-level scales",
        *(_scales(title, rows) for title, rows in summary["scales"].items()),
        f"Not allowed by the format, K being no multiple of G: {skipped}. Ratios at G = 128 are over the linears that "
        "allow it.",
        "## 2. Centre",
        "Error at G = 32, and how many times it the others are. Centred: channels whose real-valued centre is not 0.",
        _centres(summary["centres"]),
        "## 3. Massive row",
        "Share: massive tokens among the held-out ones. Known by value: of the massive, and of the other tokens.",
        _massive(summary["massive"]),
        "## 4. Cost in the quantizer",
        "Torch reference on this CPU, bfloat16 input, not a kernel's figures. Microseconds, medians with quartiles; "
        "gather and check are medians of the differences within a round.",
        _cost(summary["quantizer_cost"]),
        "## 5. Bytes",
        f"A decoder block of {summary['bytes_model']}. Bits per weight, all tensors: with group scales as stored, and "
        "with two-level scales (a byte per group, a float32 per output channel; `--scale-levels 16`).",
        _bytes(summary["bytes"]),
    ]
    return "\n\n".join(parts) + "\n"


def _centres(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ("input", "centred", "error, real centre", "integer centre", "no centre"),
        (
            (
                row["input"],
                "" if row["centred_share"] is None else f"{row['centred_share']:.0%}",
                f"{row['error']:.4f}",
                *(_ratio(row["ratio"][kind]) for kind in ("integer", "none")),
            )
            for row in rows
        ),
    )


def _massive(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ("input", "share", "known", "others taken", "massive: on", "off", "others: on", "off"),
        (
            (
                row["input"],
                f"{row['share']:.2%}",
                f"{row['found']:.0%}",
                f"{row['false']:.2%}",
                *(f"{row[kind][state]:.4f}" for kind in ("massive_error", "other_error") for state in ("on", "off")),
            )
            for row in rows
        ),
    )


def _cost(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ("M", "K", "runs", "act_quant", "gather in it", "massive check on top", "token_rows alone"),
        (
            (
                row["tokens"],
                row["in_features"],
                row["runs"],
                _spread(row["microseconds"]["act_quant"]),
                _spread(row["gather_microseconds"]),
                _spread(row["massive_check_microseconds"]),
                _spread(row["microseconds"]["token_rows alone"]),
            )
            for row in rows
        ),
    )


def _scales(title: str, rows: Sequence[dict[str, Any]]) -> str:
    table = _table(
        ("G", "scales", "linears", "error", "times G = 32, free", "times free, same G"),
        (
            (
                row["group_size"],
                f"{row['scale_levels']} levels" if row["scale_levels"] else "free",
                row["linears"],
                f"{row['error']:.4f}",
                _ratio(row["ratio"]),
                _ratio(row["levels_ratio"]) if row["scale_levels"] else "",
            )
            for row in rows
        ),
    )
    return f"{title}:\n\n{table}"


def _bytes(sizes: Sequence[dict[str, Any]]) -> str:
    def cells(size: int, name: str, own: dict[str, int]) -> tuple[object, ...]:
        weights = own["sixteen_bit"] / 2
        two_level = own["total"] - own["weight_scale"] + own["two_level_scale"]
        return (
            size,
            name,
            f"{own['total'] / 1e6:.2f}",
            f"{8 * own['total'] / weights:.3f}",
            f"{8 * two_level / weights:.3f}",
            *(
                f"{own[key] / own['total']:.3%}"
                for key in ("weight_scale", "two_level_scale", "step_and_order", "one_row", "massive")
            ),
        )

    return _table(
        (
            "G",
            "linear",
            "MB",
            "bits",
            "bits, two-level",
            "group scales",
            "two-level",
            "step, order",
            "a row",
            "massive",
        ),
        (
            cells(size["group_size"], name, own)
            for size in sizes
            for name, own in [*size["layers"].items(), ("block", size["block"])]
        ),
    )


def _ratio(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['least']:.3f} to {value['most']:.3f})"


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.0f} ({value['quartile_1']:.0f} to {value['quartile_3']:.0f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
