"""The figures of a summary as a bar chart, PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.methods import ASKING
from benchmarks.common.plots import panels, png

# Perplexities above this many times 16 bit's are cut off: such a model is useless.
CUT_RATIO = 20


def chart(summary: Mapping[str, Any]) -> bytes:
    """The chart of a summary; MorphoQuantError where matplotlib is missing."""
    language = summary["benchmark"] not in ASKING
    part = "texts" if language else "kinds"
    methods = {name: method[part] for name, method in summary["methods"].items()}
    columns = list(dict.fromkeys(column for rows in methods.values() for column in rows))
    figure, ((axes,),) = panels(1, 1, (max(7.0, 2.6 * len(columns) + 3), 5.5))
    # Imported after `panels`, which raises the one-line error if matplotlib is missing.
    from matplotlib import colormaps

    width = 0.85 / max(len(methods), 1)
    palette = [colour for name in ("tab20", "tab20b") for colour in colormaps[name].colors]
    colours = {name: palette[index % len(palette)] for index, name in enumerate(methods)}
    for index, (name, rows) in enumerate(methods.items()):
        places = [column + (index - (len(methods) - 1) / 2) * width for column in range(len(columns))]
        heights, errors = zip(*(_bar(rows.get(column), language) for column in columns), strict=True)
        hatch = "//" if summary["methods"][name]["kind"] == "served" else None
        axes.bar(
            places,
            heights,
            width,
            yerr=None if language else errors,
            label=name,
            color=colours[name],
            hatch=hatch,
            edgecolor="white",
            linewidth=0.3,
        )
    axes.set_xticks(range(len(columns)), columns)
    if language:
        best = [row["perplexity"] for row in methods.get("16bit", {}).values() if row["perplexity"]]
        every = [row["perplexity"] for rows in methods.values() for row in rows.values() if row["perplexity"]]
        if best:
            axes.set_ylim(min(every) * 0.8, min(max(every) * 1.2, max(best) * CUT_RATIO))
        axes.set_yscale("log")
    axes.set_ylabel("perplexity (logarithmic, cut off)" if language else "exact-match accuracy, standard error")
    axes.set_title(f"{summary['model']['name']} (hatched: served by vLLM)")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return png(figure)


def _bar(row: Mapping[str, Any] | None, language: bool) -> tuple[float, float]:
    """Height and error of a bar; infinite perplexities are drawn as high as a float goes before it overflows."""
    if row is None:
        return float("nan"), 0.0
    if not language:
        return row["accuracy"], row["error"]
    return (row["perplexity"] if row["perplexity"] is not None else 1e30), 0.0
