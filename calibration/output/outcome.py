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


def standing_out(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Layers whose output error is far above that of others of their kind, with the factor; the worst first.

    `layers` are those of the calibration report. A kind is the last part of a name, such as down_proj.
    """
    kinds: dict[str, dict[str, float]] = {}
    for name, layer in layers.items():
        kinds.setdefault(name.rpartition(".")[2], {})[name] = layer["output_error"]
    factors: dict[str, float] = {}
    for errors in kinds.values():
        middle = statistics.median(errors.values())
        factors |= {name: error / middle for name, error in errors.items() if error > FACTOR * middle > 0}
    return dict(sorted(factors.items(), key=lambda item: -item[1]))


def outcome_lines(report: Mapping[str, Any], output: Path) -> list[str]:
    """The lines that end a calibration."""
    layers = report["layers"]
    shown = one_line(str(output))
    lines = [f"{shown}: {len(layers)} layers quantized, escape rate {report['escape_rate']:.2%}"]
    found = standing_out(layers)
    if found:
        named = ", ".join(f"{name} ({factor:.1f}x)" for name, factor in list(found.items())[:NAMED])
        lines.append(f"output errors far above those of their kind, in {len(found)} layers: {named}")
    place = shlex.quote(shown)
    # vLLM on a CPU takes nearly all memory unless it is told; on a GPU it does not read the variable.
    return [*lines, f"next: morphoquant doctor --model {place} && VLLM_CPU_KVCACHE_SPACE=4 vllm serve {place}"]
