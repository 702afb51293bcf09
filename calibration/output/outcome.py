"""What a finished calibration has to say: layers that stand out, and the next commands. Pure."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import one_line

# A layer stands out if its output error is this many times the median of the layers of its kind in all blocks.
FACTOR = 2.0
# So many are named; the report has all.
NAMED = 5


def experts_errors(report: Mapping[str, Any]) -> dict[str, float]:
    """Output errors of the inputs of all experts of a report that saw tokens, by name."""
    return {
        f"{name}.{expert}.{kind}_proj": error
        for name, figures in report.get("experts", {}).items()
        for kind in ("gate_up", "down")
        for expert, error in enumerate(figures[f"{kind}_error"])
        if error is not None
    }


def standing_out(errors_of: Mapping[str, float]) -> dict[str, float]:
    """Layers whose output error is far above that of others of their kind, with the factor; the worst first.

    A kind is the last part of a name, such as down_proj.
    """
    kinds: dict[str, dict[str, float]] = {}
    for name, error in errors_of.items():
        kinds.setdefault(name.rpartition(".")[2], {})[name] = error
    factors: dict[str, float] = {}
    for errors in kinds.values():
        middle = statistics.median(errors.values())
        factors |= {name: error / middle for name, error in errors.items() if error > FACTOR * middle > 0}
    return dict(sorted(factors.items(), key=lambda item: -item[1]))


def outcome_lines(report: Mapping[str, Any], output: Path) -> list[str]:
    """The lines that end a calibration."""
    layers = report["layers"]
    count = sum(len(figures["tokens"]) for figures in report.get("experts", {}).values())
    experts = f" and {count} experts" if count else ""
    shown = one_line(str(output))
    lines = [f"{shown}: {len(layers)} layers{experts} quantized, escape rate {report['escape_rate']:.2%}"]
    found = standing_out({name: layer["output_error"] for name, layer in layers.items()} | experts_errors(report))
    if found:
        named = ", ".join(f"{name} ({factor:.1f}x)" for name, factor in list(found.items())[:NAMED])
        lines.append(f"output errors far above those of their kind, in {len(found)} layers: {named}")
    place = shlex.quote(shown)
    return [*lines, f"next: morphoquant doctor --model {place} && vllm serve {place}"]
