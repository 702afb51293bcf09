"""Draws the page's pictures, each as PNG bytes. Each modality has one colour everywhere; escapes are red."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from calibration.output.page.content import Content, Input
from morphoquant_vllm.numerics.activation import ESCAPE_MAX, ESCAPE_MIN
from morphoquant_vllm.numerics.reference import CODE_MAX, CODE_MIN

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"text": "#0072B2", "image": "#009E73", "video": "#56B4E9", "audio": "#CC79A7", "massive": "#333333"}
OTHER_COLOUR = "#999999"
GRID_COLOUR = "#F0E442"
ESCAPE_COLOUR = "#D55E00"
DPI = 110
WIDTH = 10.0


def colour(row: str) -> str:
    """The colour of a modality."""
    return COLOURS.get(row, OTHER_COLOUR)


def channels(entry: Input, rows: Sequence[str]) -> bytes:
    """Range of every kept channel by modality, with the 4-bit grid and the values outside it."""
    present = entry.rows(rows)
    figure, axes = plt.subplots(len(present), 1, figsize=(WIDTH, 0.6 + 1.9 * len(present)), sharex=True, squeeze=False)
    kept = entry.distribution["channels"].long()
    step = entry.grid["activation_step"][kept]
    # Sorted by step, the grid is drawn as a curve instead of a zigzag.
    order = step.argsort(stable=True)
    for axis, row in zip(axes[:, 0], present, strict=True):
        index = rows.index(row)
        centre, gain = entry.grid["centre"][index][kept][order], entry.grid["gain"][index]
        low, high = centre + (CODE_MIN - 0.5) * step[order] * gain, centre + (CODE_MAX + 0.5) * step[order] * gain
        mask = entry.grid["modality_mask"][index][kept][order].numpy()
        ranges = {key: entry.distribution.get(f"{row}.{key}") for key in ("minimum", "maximum", "low", "high")}
        _channel_ranges(axis, ranges, order, low.numpy(), high.numpy(), mask, colour(row))
        axis.set_ylabel(row)
    axes[-1, 0].set_xlabel(f"{kept.numel()} of {entry.grid['activation_step'].numel()} channels, by rising step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=8)
    return _png(figure, top=0.5)


def _channel_ranges(
    axis: Axes,
    ranges: dict[str, Tensor | None],
    order: Tensor,
    low: np.ndarray,
    high: np.ndarray,
    mask: np.ndarray,
    shade: str,
) -> None:
    def values(key: str) -> np.ndarray | None:
        found = ranges[key]
        return None if found is None else found.float()[order].numpy()

    x = np.arange(low.size)
    minimum, maximum = values("minimum"), values("maximum")
    assert minimum is not None and maximum is not None
    axis.fill_between(x, low, high, step="mid", color=GRID_COLOUR, alpha=0.7, label="4-bit grid", linewidth=0)
    axis.vlines(x, minimum, maximum, color=shade, alpha=0.45, linewidth=0.9, label="least to largest value")
    inner_low, inner_high = values("low"), values("high")
    if inner_low is not None and inner_high is not None:
        axis.vlines(x, inner_low, inner_high, color=shade, linewidth=1.6, label="1 % to 99 %")
    for outer, edge, outside in ((minimum, low, minimum < low), (maximum, high, maximum > high)):
        there = mask & outside
        axis.vlines(x[there], edge[there], outer[there], color=ESCAPE_COLOUR, linewidth=1.2,
                    label="escapes to 8 bits" if outer is minimum else "_")  # fmt: skip
    axis.plot(x[mask], np.zeros(int(mask.sum())), "|", color="black", markersize=3, alpha=0.35,
              label=f"may escape ({int(mask.sum())} of {mask.size})")  # fmt: skip
    threshold = float(np.median(np.maximum(np.abs(low), np.abs(high))))
    axis.set_yscale("symlog", linthresh=max(threshold, 1e-6))
    axis.set_xlim(-1, low.size)


def codes(entry: Input, rows: Sequence[str]) -> bytes:
    """Histogram of the served codes, by modality, with the 4-bit codes shaded."""
    present = [row for row in entry.rows(rows) if int(entry.distribution[f"{row}.codes"].sum())]
    figure, axis = plt.subplots(figsize=(WIDTH, 2.6))
    axis.axvspan(CODE_MIN - 0.5, CODE_MAX + 0.5, color=GRID_COLOUR, alpha=0.7, linewidth=0, label="4-bit codes")
    x = np.arange(ESCAPE_MIN, ESCAPE_MAX + 1)
    for row in present:
        counts = entry.distribution[f"{row}.codes"].numpy()
        share = counts / counts.sum()
        outside = float(share[(x < CODE_MIN) | (x > CODE_MAX)].sum())
        seen = share > 0
        axis.plot(x[seen], share[seen], drawstyle="steps-mid", color=colour(row), linewidth=1.2,
                  label=f"{row}: {outside:.2%} outside")  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlim(ESCAPE_MIN, ESCAPE_MAX)
    axis.set_xlabel("code")
    axis.set_ylabel("share of codes")
    axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def losses(content: Content) -> bytes:
    """Output error and escape rate of every layer, in the order of the checkpoint."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 4.8), sharex=True)
    layers = content.inspected["layers"]
    kinds = list(dict.fromkeys(layer["name"].rsplit(".", 1)[-1] for layer in layers))
    markers = "os^vDPX*<>"
    for number, kind in enumerate(kinds):
        at = [index for index, layer in enumerate(layers) if layer["name"].endswith(f".{kind}")]
        style = {"marker": markers[number % len(markers)], "markersize": 4, "linewidth": 0.8, "label": kind}
        upper.plot(at, [100 * (layers[index]["output_error"] or np.nan) for index in at], **style)
        rates = [(layers[index]["escape_rate"] or {}).get("all", np.nan) for index in at]
        lower.plot(at, [100 * rate for rate in rates], **style)
    budget = content.report.settings.get("escape_budget")
    if isinstance(budget, float) and 0 <= budget <= 1:
        label = "mean escape budget" if content.report.settings.get("budget") == "model" else "escape budget"
        lower.axhline(100 * budget, color=ESCAPE_COLOUR, linestyle="--", linewidth=1, label=label)
    upper.set_ylabel("output error, %")
    lower.set_ylabel("escape rate, %")
    for axis in (upper, lower):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    lower.set_xlabel("layer, in the order of the checkpoint")
    upper.legend(fontsize=8, ncols=4, frameon=False)
    lower.legend(*[part[-1:] for part in lower.get_legend_handles_labels()], fontsize=8, frameon=False)
    return _png(figure)


def dispersion(content: Content) -> bytes:
    """Dispersion scores over the decoder: median, 99th percentile and largest channel of every input, by modality."""
    inputs = [entry for entry in content.inputs if entry.distribution]
    kinds = list(dict.fromkeys(entry.name.rsplit(".", 1)[-1] for entry in inputs))
    figure, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 3.0), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        inputs_of_kind = [entry for entry in inputs if entry.name.endswith(f".{kind}")]
        for row in content.spec.rows:
            at = [number for number, entry in enumerate(inputs_of_kind) if f"{row}.dispersion" in entry.distribution]
            scores = [inputs_of_kind[number].distribution[f"{row}.dispersion"].float().numpy() for number in at]
            if not scores:
                continue
            for quantile, line in ((1.0, "-"), (0.99, "--"), (0.5, ":")):
                axis.plot(at, [np.quantile(score, quantile) for score in scores], line, marker=".", color=colour(row),
                          linewidth=1, label=row if quantile == 1.0 else None)  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("decoder block")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("dispersion score")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return _png(figure, top=0.35)


def sizes(content: Content) -> bytes:
    """Bytes of the quantized layers and of everything else, in 16 bit and as stored."""
    totals = content.inspected["totals"]
    rest = totals["bytes"] - totals["quantized_bytes"]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.7))
    labels = ("stored", "16 bit")
    quantized = np.array((totals["quantized_bytes"], totals["quantized_bytes_16bit"])) / 1e6
    axis.barh(labels, quantized, color=COLOURS["text"], label="quantized layers")
    axis.barh(labels, [rest / 1e6] * 2, left=quantized, color=OTHER_COLOUR, label="everything else")
    axis.set_xlabel("MB")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return _png(figure)


def _png(figure: Figure, *, top: float = 0.1) -> bytes:
    """The picture, with `top` inches free above its axes. (matplotlib's automatic layout would draw it twice.)"""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.1 / width, 1 - top / height, wspace=0.05, hspace=0.1)
    buffer = io.BytesIO()
    # The software's version is left out, so the same checkpoint gives the same page.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
