"""The one JSON object per benchmark that is kept under version control: figures, machine, versions and data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.accuracy.job import Job, calibration_report, results
from benchmarks.accuracy.methods import METHODS, Served
from benchmarks.accuracy.omni import QUESTIONS
from benchmarks.accuracy.reporting import scores
from benchmarks.accuracy.serving.served import data_digest
from benchmarks.common.files import file_digest
from benchmarks.common.machine import processor, versions

# If the 16-bit model was not measured in vLLM, transformers in float32 is the reference.
SERVED_REFERENCE, REFERENCE = "served-16bit", "16bit"
OURS = "served"
FORMAT = 2


def summarize(job: Job, command: str) -> dict[str, Any]:
    """All results of `job` in the cache; `command` is the user's command line."""
    raw: dict[str, dict[str, dict[str, Any]]] = {}
    for name, evaluation, result in results(job):
        raw.setdefault(name, {})[evaluation] = result
    figures = _language if job.benchmark == "language" else _omni
    settings = job.settings
    return {
        "format": FORMAT,
        "benchmark": job.benchmark,
        "command": command,
        "machine": processor(),
        "versions": versions(),
        "seed": settings.seed,
        "model": {"name": job.model.name, "sha256": file_digest([job.model])},
        "calibration": {"sha256": data_digest(job.calibration), "max_samples": job.max_samples}
        | ({"windows": dict(settings.calibration)} if job.benchmark == "language" else {}),
        "evaluation": {"sha256": dict(job.evaluations)}
        | (
            {"windows": settings.windows, "window_tokens": settings.window_tokens}
            if job.benchmark == "language"
            else {"questions_per_kind": settings.questions}
        ),
        "served_dtype": settings.dtype,
        "methods": {
            name: {
                "kind": type(METHODS[name]).__name__.lower(),
                "settings": asdict(METHODS[name]),
                **figures(name, found, raw),
                "against_ours": (_language_against if job.benchmark == "language" else _omni_against)(found, raw),
                "activations": _activations(name, list(found.values())),
                "calibration": calibration_report(job, name),
            }
            for name, found in raw.items()
        },
    }


def _activations(name: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    counts = scores.merge_counts([result["beyond"] for result in found])
    kind = "escape" if isinstance(METHODS[name], Served) else "bypass"
    return scores.activation_bits(counts, kind) if counts else None


def _reference(name: str, raw: Mapping[str, Any]) -> str:
    served = isinstance(METHODS[name], Served) and SERVED_REFERENCE in raw
    return SERVED_REFERENCE if served else REFERENCE


def _language(name: str, found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for text, result in found.items():
        rows[text] = {"perplexity": _number(scores.perplexity(result["losses"], result["tokens"]))}
        reference = raw.get(_reference(name, raw), {}).get(text)
        if reference is not None:
            mean, error = scores.log_ratio(result["losses"], reference["losses"], result["tokens"])
            rows[text] |= {"log_ratio_to_16bit": mean, "log_ratio_error": _number(error)}
        rows[text]["activations"] = _activations(name, [result])
    return {"texts": rows}


def _omni(name: str, found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    right = _with_all(found[QUESTIONS]["right"])
    stored = raw.get(_reference(name, raw), {}).get(QUESTIONS)
    reference = _with_all(stored["right"]) if stored is not None else {}
    rows: dict[str, dict[str, Any]] = {}
    for kind, outcomes in right.items():
        share, error = scores.accuracy(outcomes)
        rows[kind] = {"accuracy": share, "error": error, "questions": len(outcomes)}
        if kind in reference:
            difference, difference_error = scores.accuracy_difference(outcomes, reference[kind])
            rows[kind] |= {"difference": difference, "difference_error": _number(difference_error)}
    return {"kinds": rows}


def _language_against(found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, float] | None:
    """Perplexity over ours on all windows of all texts, and its standard error; None unless both have every text."""
    ours = raw.get(OURS, {})
    if not ours or set(ours) != set(found):
        return None
    losses, reference = ([loss for text in found for loss in each[text]["losses"]] for each in (found, ours))
    mean, error = scores.log_ratio(losses, reference, sum(result["tokens"] for result in found.values()))
    ratio = math.exp(mean)
    return {"ratio": ratio, "error": ratio * error}


def _omni_against(found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, float] | None:
    """Our accuracy less this one, on the same questions, and its standard error."""
    if OURS not in raw:
        return None
    ours, right = (_with_all(each[QUESTIONS]["right"])["all"] for each in (raw[OURS], found))
    difference, error = scores.accuracy_difference(ours, right)
    return {"difference": difference, "error": error}


def _with_all(right: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {**right, "all": [outcome for outcomes in right.values() for outcome in outcomes]}


def _number(value: float) -> float | None:
    """JSON knows no infinity and no NaN."""
    return value if math.isfinite(value) else None
