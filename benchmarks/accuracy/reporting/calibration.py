"""The parts that a summary keeps of the reports of calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.job import Job, model_of
from benchmarks.accuracy.methods import METHODS, Served


def calibration_report(job: Job, name: str) -> dict[str, Any] | None:
    """The calibration's report of a served checkpoint: settings, data and escape rate."""
    method = METHODS[name]
    if not isinstance(method, Served) or not method.quantized:
        return None
    directory = model_of(job, method)
    file = None if directory is None else directory / "morphoquant_calibration.json"
    if file is None or not file.is_file():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    kept = {part: report[part] for part in ("settings", "data", "escape_rate", "learning") if part in report}
    return {**kept, "modality_rows": modality_rows(report["layers"])}


def modality_rows(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By modality: the number of linear inputs, of those with a separate row, and the factor of their error.

    `layers` are those of a calibration report; linears that share an input count once. "error_ratio" is a geometric
    mean over the inputs with a separate row: the error on held-out tokens with that row over the error without it.
    """
    inputs = {json.dumps([layer["escape_rate"], layer.get("modality_rows")]): layer for layer in layers.values()}
    choices: dict[str, list[Mapping[str, Any]]] = {}
    for layer in inputs.values():
        for row, choice in layer.get("modality_rows", {}).items():
            choices.setdefault(row, []).append(choice)
    found = {}
    for row, made in choices.items():
        logs = [math.log(choice["own_error"] / choice["any_error"]) for choice in made if choice["own"]]
        found[row] = {"inputs": len(made), "own": len(logs)}
        if logs:
            found[row]["error_ratio"] = math.exp(sum(logs) / len(logs))
    return found
