"""What a finished calibration has to say: blocks and layers that stand out, and the next commands. Pure."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import one_line

# A layer stands out if its output error is this many times the median of the layers of its kind in all blocks.
FACTOR = 2.0
# So does a block whose loss is this many times that of its neighbours.
BLOCK = re.compile(r"(.*?)\.(\d+)\.")
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


def block_losses(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """The loss of each block, the mean output error of its layers, by the name of the list of blocks and its index."""
    errors: dict[str, dict[int, list[float]]] = {}
    for name, layer in layers.items():
        if found := BLOCK.match(name):
            errors.setdefault(found[1], {}).setdefault(int(found[2]), []).append(layer["output_error"])
    return {
        blocks: {index: statistics.mean(of_block[index]) for index in sorted(of_block)}
        for blocks, of_block in errors.items()
    }


def above_neighbours(losses: Mapping[int, float]) -> dict[int, float]:
    """Blocks whose loss is far above the mean of the blocks before and after, with the factor."""
    order = list(losses)
    factors = {}
    for place, index in enumerate(order):
        neighbours = [losses[other] for other in order[max(0, place - 1) : place + 2] if other != index]
        middle = statistics.mean(neighbours) if neighbours else losses[index]
        if losses[index] > FACTOR * middle > 0:
            factors[index] = losses[index] / middle
    return factors


def _block_lines(blocks: str, losses: Mapping[int, float]) -> list[str]:
    lowest, highest = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    lines = [f"losses in {blocks}: {losses[lowest]:.4f} (block {lowest}) to {losses[highest]:.4f} (block {highest})"]
    found = above_neighbours(losses)
    if found:
        named = ", ".join(f"{index} ({factor:.1f}x)" for index, factor in list(found.items())[:NAMED])
        lines.append(f"losses far above those of the neighbours, in blocks: {named}")
    return lines


def outcome_lines(report: Mapping[str, Any], output: Path) -> list[str]:
    """The lines that end a calibration."""
    layers = report["layers"]
    count = sum(len(figures["tokens"]) for figures in report.get("experts", {}).values())
    experts = f" and {count} experts" if count else ""
    shown = one_line(str(output))
    lines = [f"{shown}: {len(layers)} layers{experts} quantized, escape rate {report['escape_rate']:.2%}"]
    if bits := report.get("bits"):
        wide, kept = len(bits["eight_bit"]), len(bits["sixteen_bit"])
        lines.append(f"bits of a weight: {bits['mean']:.3f}; inputs with 8-bit weights: {wide}, in 16 bit: {kept}")
    for blocks, losses in block_losses(layers).items():
        lines += _block_lines(blocks, losses)
    found = standing_out({name: layer["output_error"] for name, layer in layers.items()} | experts_errors(report))
    if found:
        named = ", ".join(f"{name} ({factor:.1f}x)" for name, factor in list(found.items())[:NAMED])
        lines.append(f"output errors far above those of their kind, in {len(found)} layers: {named}")
    place = shlex.quote(shown)
    # vLLM on a CPU takes nearly all memory unless it is told; on a GPU it does not read the variable.
    return [*lines, f"next: morphoquant doctor --model {place} && VLLM_CPU_KVCACHE_SPACE=4 vllm serve {place}"]
