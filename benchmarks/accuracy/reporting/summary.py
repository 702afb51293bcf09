"""The one JSON object per benchmark that is kept under version control: figures, machine, versions and data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.accuracy.job import Job, made, results
from benchmarks.accuracy.methods import ASKING, METHODS, Served
from benchmarks.accuracy.omni import EXPERT_ERRORS, QUESTIONS, TOKENS
from benchmarks.accuracy.reporting import scores
from benchmarks.accuracy.reporting.bars import FORMAT
from benchmarks.accuracy.reporting.calibration import calibration_report
from benchmarks.accuracy.serving.served import data_digest
from benchmarks.common.files import file_digest
from benchmarks.common.machine import versions

# If the 16-bit model was not measured in vLLM, transformers in float32 is the reference.
SERVED_REFERENCE, REFERENCE = "served-16bit", "16bit"
OURS = "served"
# Above it exp overflows.
MAX_LOG = 700


def summarize(job: Job, command: str) -> dict[str, Any]:
    """All results of `job` in the cache; `command` is the user's command line."""
    raw: dict[str, dict[str, dict[str, Any]]] = {}
    for name, evaluation, result in results(job):
        raw.setdefault(name, {})[evaluation] = result
    language, settings = job.benchmark not in ASKING, job.settings
    if not language:
        # The answers of transformers are not those of an engine that was not asked.
        asked = {name for name, found in raw.items() if QUESTIONS in found or not isinstance(METHODS[name], Served)}
        raw = {name: found for name, found in raw.items() if name in asked}
    figures = _language if language else _omni
    by = {name: made(job, name) for name in raw}
    return {
        "format": FORMAT,
        "benchmark": job.benchmark,
        "command": command,
        # Results of before do not say.
        "machine": ", ".join(sorted({name for one in by.values() for name in one["machine"] or ["unknown"]})),
        "versions": versions(),
        "seed": settings.seed,
        "model": {"name": job.model.name, "sha256": file_digest([job.model])},
        "calibration": {"sha256": data_digest(job.calibration), "max_samples": job.max_samples}
        | ({"windows": dict(settings.calibration_of(job.benchmark))} if language else {}),
        "evaluation": {"sha256": dict(job.evaluations)}
        | (
            {"windows": settings.windows_of(job.benchmark), "window_tokens": settings.window_tokens}
            if language
            else {"questions_per_kind": settings.questions}
        ),
        "served_dtype": settings.dtype,
        "methods": {
            name: {
                "kind": type(METHODS[name]).__name__.lower(),
                "settings": asdict(METHODS[name]),
                **figures(name, found, raw),
                "against_ours": (_language_against if language else _omni_against)(found, raw),
                "activations": _activations(name, list(found.values())),
                "calibration": calibration_report(job, name),
                "made": by[name],
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
    reference = raw.get(_reference(name, raw), {})
    return {"texts": rows, "against_16bit": _ratio(found, reference)}


def _omni(name: str, found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    right = _right(found)
    stored = raw.get(_reference(name, raw))
    reference = _right(stored) if stored is not None else {}
    rows: dict[str, dict[str, Any]] = {}
    for kind, outcomes in right.items():
        share, error = scores.accuracy(outcomes)
        rows[kind] = {"accuracy": share, "error": error, "questions": len(outcomes)}
        if kind in reference:
            rows[kind] |= _paired("difference", outcomes, reference[kind])
    _add_predictions(rows, found.get(TOKENS), raw.get(REFERENCE, {}).get(TOKENS))
    experts = {EXPERT_ERRORS: found[EXPERT_ERRORS]["lists"]} if EXPERT_ERRORS in found else {}
    return {"kinds": rows, **experts}


def _add_predictions(
    rows: Mapping[str, dict[str, Any]], own: Mapping[str, Any] | None, reference: Mapping[str, Any] | None
) -> None:
    """Add "divergence" from 16 bit and "loss" of the right answer to each kind's row."""
    if own is None:
        return
    divergence, loss = _with_all(own["divergence"]), _with_all(own["loss"])
    other = _with_all(reference["loss"]) if reference is not None else {}
    for kind, row in rows.items():
        for figure, values in (("divergence", divergence[kind]), ("loss", loss[kind])):
            mean, error = scores.mean_and_error(values)
            row |= {figure: mean, f"{figure}_error": _number(error)}
        if kind in other:
            row |= _paired("loss_difference", loss[kind], other[kind])


def _paired(figure: str, values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """A difference on the same questions, with its standard error and its interval."""
    difference, error = scores.paired_difference(values, reference)
    bounds = [_number(bound) for bound in scores.interval(difference, error, len(values))]
    return {figure: difference, f"{figure}_error": _number(error), f"{figure}_interval": bounds}


def _right(found: Mapping[str, Any]) -> dict[str, list[int]]:
    """Right answers by kind, and of all: the engine's own, or those of greedy decoding in this process."""
    return _with_all(found.get(QUESTIONS, found.get(TOKENS, {}))["right"])


def _language_against(found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Perplexity over ours on all windows of all texts, and its standard error; None unless both have every text."""
    return _ratio(found, raw.get(OURS, {}))


def _ratio(found: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, float | None] | None:
    if not others or set(others) != set(found):
        return None
    losses, reference = ([loss for text in found for loss in each[text]["losses"]] for each in (found, others))
    mean, error = scores.log_ratio(losses, reference, sum(result["tokens"] for result in found.values()))
    ratio = math.exp(mean) if mean < MAX_LOG else math.inf
    return {"ratio": _number(ratio), "error": _number(ratio * error)}


def _omni_against(found: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our accuracy less this one, on the same questions, its standard error and its interval."""
    if OURS not in raw:
        return None
    ours, right = (_right(each)["all"] for each in (raw[OURS], found))
    found = _paired("difference", ours, right)
    return {name.removeprefix("difference_"): value for name, value in found.items()}


def _with_all(values: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {**values, "all": [value for own in values.values() for value in own]}


def _number(value: float) -> float | None:
    """JSON knows no infinity and no NaN."""
    return value if math.isfinite(value) else None
