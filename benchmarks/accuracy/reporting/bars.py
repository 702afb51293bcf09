"""The targets of the served method, checked against a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.methods import ASKING, MOE_OMNI
from morphoquant_vllm.errors import MorphoQuantError

OURS, ORACLE, RTN, GPTQ = "served", "oracle-rtn-g64", "w4a16-rtn-g64", "w4a16-gptq-g64"
# GPTQ with groups as large as ours.
GPTQ_SAME_GROUPS = "w4a16-gptq-g32"
# Largest ratio of our perplexity, on all windows of all texts together: to 16 bit's by benchmark, and to a method's.
RATIOS_TO_16BIT = {"language": 1.12, "own-kinds": 1.07, "small-text": 1.04}
RATIOS = {
    "w4a4-hadamard-gptq": 0.78,
    "w4a16-auto-round-g32": 1.02,
    "w4a16-auto-round-light-g32": 1.02,
    "served-group": 1.002,
}
ESCAPE_RATE, LAYER_ESCAPE_RATE = 0.045, 0.20
# Losses of accuracy and its standard error, as fractions of 1.
MAX_LOSS, MAX_LOSS_OF_KIND, MAX_ERROR = 0.01, 0.02, 0.005
NAIVE_LOSSES = {"w4a4-static-tensor": 0.20, "w4a4-token": 0.05}
# Questions that rank working methods must separate this one from 16 bit: it loses at least these points, and its
# paired interval excludes 0.
HARD_FOR, HARD_LOSS = "w4a16-rtn-g64", 0.02

Bar = tuple[str, bool, str]
# Of the summaries that are read here.
FORMAT = 3


def check(summary: Mapping[str, Any]) -> list[Bar]:
    """(what is asked, whether it holds, the figures) for every bar whose methods were measured."""
    if summary.get("format") != FORMAT:
        raise MorphoQuantError(
            f"{summary['benchmark']}: the result has format {summary.get('format')}, not {FORMAT}; measure again, or "
            "name other --results"
        )
    if summary["benchmark"] == MOE_OMNI:
        return _experts(summary["methods"])
    if summary["benchmark"] in ASKING:
        return _omni(summary["methods"])
    return _language(summary["methods"], RATIOS_TO_16BIT.get(summary["benchmark"]))


def _escapes(where: str, activations: Mapping[str, Any] | None) -> list[Bar]:
    if activations is None:
        return []
    rate, worst = activations["rate"], activations["worst_rate"]
    return [
        (f"{where}: escapes at most {ESCAPE_RATE:.1%}", rate <= ESCAPE_RATE, f"{rate:.2%}"),
        (
            f"{where}: escapes at most {LAYER_ESCAPE_RATE:.0%} in any layer",
            worst <= LAYER_ESCAPE_RATE,
            f"{worst:.2%} in {activations['worst_layer']}",
        ),
    ]


def _language(methods: Mapping[str, Any], goal: float | None) -> list[Bar]:
    ours = methods.get(OURS)
    if ours is None:
        return []
    bars: list[Bar] = []
    if goal is not None and ours["against_16bit"] is not None:
        ratio = ours["against_16bit"]["ratio"]
        bars.append((f"together: perplexity at most {goal} times 16 bit's", ratio <= goal, f"{ratio:.3f}"))
    for other, limit in RATIOS.items():
        found = methods.get(other, {}).get("against_ours")
        if found is not None and found["ratio"] is not None:
            ratio = 1 / found["ratio"]
            bars.append((f"together: perplexity at most {limit} times {other}'s", ratio <= limit, f"{ratio:.3f}"))
    for text, row in ours["texts"].items():
        perplexity = row["perplexity"]
        for other in (ORACLE, RTN, GPTQ_SAME_GROUPS):
            theirs = methods.get(other, {}).get("texts", {}).get(text, {}).get("perplexity")
            if perplexity is None or theirs is None:
                continue
            figures = f"{perplexity:.2f} / {theirs:.2f} = {perplexity / theirs:.3f}"
            bars.append((f"{text}: perplexity below {other}'s", perplexity < theirs, figures))
        bars += _escapes(text, row["activations"])
    return [*bars, *_escapes("together", ours["activations"])]


def _omni(methods: Mapping[str, Any]) -> list[Bar]:
    bars: list[Bar] = []
    ours = methods.get(OURS, {})
    for kind, row in ours.get("kinds", {}).items():
        if "difference" in row:
            limit = MAX_LOSS if kind == "all" else MAX_LOSS_OF_KIND
            loss, error = -row["difference"], row["difference_error"] or 0.0
            bars.append((f"{kind}: loses at most {limit:.0%}", loss <= limit, f"{loss:.2%} ± {error:.2%}"))
        if kind == "all":
            bars.append((f"standard error at most {MAX_ERROR:.1%}", row["error"] <= MAX_ERROR, f"{row['error']:.2%}"))
    for name, least in NAIVE_LOSSES.items():
        row = methods.get(name, {}).get("kinds", {}).get("all", {})
        if "difference" in row:
            loss = -row["difference"]
            bars.append((f"{name} loses at least {least:.0%}", loss >= least, f"{loss:.2%}"))
    row = methods.get(HARD_FOR, {}).get("kinds", {}).get("all", {})
    if "difference_interval" in row:
        low, high = (-bound for bound in reversed(row["difference_interval"]))
        asked = f"{HARD_FOR} loses at least {HARD_LOSS:.0%}, its interval excludes 0"
        figures = f"{-row['difference']:.2%}, {low:.2%} to {high:.2%}"
        bars.append((asked, -row["difference"] >= HARD_LOSS and low > 0, figures))
    if ours:
        bars += [*_divergence(ours, methods, GPTQ_SAME_GROUPS), *_escapes("questions", ours["activations"])]
    return bars


def _experts(methods: Mapping[str, Any]) -> list[Bar]:
    """Ours is not worse than W4A16 GPTQ: in answers at 95 %, and in divergence from 16 bit by its mean."""
    bars: list[Bar] = []
    ours = methods.get(OURS, {})
    for name in (GPTQ, GPTQ_SAME_GROUPS):
        theirs = methods.get(name, {})
        if not ours or not theirs:
            continue
        found = theirs["against_ours"]
        difference, high = found["difference"], found["interval"][1]
        figures = f"{difference:+.2%}, {found['interval'][0]:+.2%} to {high:+.2%}"
        bars.append((f"answers not worse than {name}'s: the interval of ours - {name} reaches 0", high >= 0, figures))
        bars += _divergence(ours, methods, name)
    return bars


def _divergence(ours: Mapping[str, Any], methods: Mapping[str, Any], name: str) -> list[Bar]:
    """Our mean divergence from 16 bit is at most that of the method `name`."""
    rows = [each.get("kinds", {}).get("all", {}) for each in (ours, methods.get(name, {}))]
    if not all("divergence" in row for row in rows):
        return []
    own, other = (row["divergence"] for row in rows)
    figures = f"{1000 * own:.2f} / {1000 * other:.2f} thousandths of a nat"
    return [(f"divergence at most {name}'s", own <= other, figures)]
