"""The common work of the benchmarks here: run methods that are missing from the cache, and read cached results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import simulation
from benchmarks.accuracy.cache import Cache
from benchmarks.accuracy.methods import METHODS, Served, Simulated
from benchmarks.accuracy.serving import served
from benchmarks.accuracy.settings import EVALUATOR_VERSION, Settings
from benchmarks.common.files import code_digest, file_digest
from benchmarks.models import decoder

HERE = Path(__file__).parent
SIMULATION_CODE = [
    HERE / "baselines",
    HERE / "simulation.py",
    Path(decoder.__file__),
    served.REPOSITORY / "morphoquant_vllm" / "numerics" / "reference.py",
]


@dataclass(frozen=True)
class Job:
    """A model, the calibration data of every method, and the evaluation sets."""

    benchmark: str
    settings: Settings
    model: Path
    calibration: list[Path]
    # At most this many calibration samples are used.
    max_samples: int
    # Hash of each evaluation set (a text, all questions), by name.
    evaluations: Mapping[str, str]
    # Description of an evaluation set for the served worker, JSON.
    described: Callable[[str], dict[str, Any]]
    # The result of a simulated model on an evaluation set.
    evaluate: Callable[[Any, str], dict[str, Any]]

    @property
    def cache(self) -> Cache:
        return Cache(self.settings.work / "results")


def model_of(job: Job, method: Served) -> Path:
    """Directory that vLLM serves for a method; a checkpoint may not exist yet."""
    if not method.quantized:
        return job.model
    recipe = served.recipe_of(job.settings, method, job.max_samples)
    return served.checkpoint_path(job.settings, job.model, job.calibration, recipe)


def key(job: Job, name: str, evaluation: str) -> dict[str, Any] | None:
    """Everything a result depends on; None for a served method whose checkpoint is not made yet."""
    method, settings = METHODS[name], job.settings
    found = {
        "benchmark": job.benchmark,
        "evaluator": EVALUATOR_VERSION,
        "kind": type(method).__name__,
        # The settings identify the method, so a renamed one keeps its results.
        "method": asdict(method),
        "evaluation": job.evaluations[evaluation],
        "seed": settings.seed,
    }
    if isinstance(method, Simulated):
        found |= {"model": file_digest([job.model]), "code": code_digest(SIMULATION_CODE)}
        if method.calibrated:
            sample = {"max_samples": job.max_samples, "window_tokens": settings.window_tokens}
            found |= {"data": served.data_digest(job.calibration), **sample}
        return found
    directory = model_of(job, method)
    if not (directory / "config.json").is_file():
        return None
    code = code_digest(served.SERVING_CODE) if method.quantized else None
    return {**found, "model": file_digest([directory]), "dtype": settings.dtype, "code": code}


def load(job: Job, name: str, evaluation: str) -> dict[str, Any] | None:
    """The cached result of a method on an evaluation set, or None."""
    found = key(job, name, evaluation)
    return job.cache.load(found) if found is not None else None


def results(job: Job) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, evaluation set, result) of every result in the cache with the present settings."""
    for name in METHODS:
        for evaluation in job.evaluations:
            result = load(job, name, evaluation)
            if result is not None:
                yield name, evaluation, result


def run(job: Job, name: str, wanted: Iterable[str]) -> None:
    """Make the results of a method on the evaluation sets `wanted` that are not in the cache."""
    method = METHODS[name]
    if isinstance(method, Served) and method.quantized:
        recipe = served.recipe_of(job.settings, method, job.max_samples)
        served.calibrate(model_of(job, method), job.model, job.calibration, recipe)
    missing = {evaluation: key(job, name, evaluation) for evaluation in wanted}
    missing = {evaluation: found for evaluation, found in missing.items() if job.cache.load(found or {}) is None}
    if not missing:
        return
    if isinstance(method, Served):
        _serve(job, name, method, missing)
    else:
        _simulate(job, method, missing)


def _serve(job: Job, name: str, method: Served, missing: Mapping[str, Any]) -> None:
    description = {
        "benchmark": job.benchmark,
        "model": str(model_of(job, method).resolve()),
        "dtype": job.settings.dtype,
        "seed": job.settings.seed,
        "cache": str(job.cache.directory.resolve()),
        "tasks": [{"key": found, **job.described(evaluation)} for evaluation, found in missing.items()],
    }
    served.run_engine(job.settings.work / "engines", f"{job.benchmark}-{name}", description)


def _simulate(job: Job, method: Simulated, missing: Mapping[str, Any]) -> None:
    model = decoder.load(job.model)
    samples = []
    if method.calibrated:
        size = job.settings.window_tokens
        samples = decoder.calibration_inputs(job.model, job.calibration, size, job.max_samples)
    counting = simulation.apply(model, decoder.blocks_of(model, job.model), method, samples, job.settings.seed)
    for evaluation, found in missing.items():
        for quantizer in counting.values():
            quantizer.bypassed = quantizer.total = 0
        result = job.evaluate(model, evaluation)
        beyond = {layer: [quantizer.bypassed, quantizer.total] for layer, quantizer in counting.items()}
        job.cache.store(found, {**result, "beyond": beyond})


def calibration_report(job: Job, name: str) -> dict[str, Any] | None:
    """The calibration's report of a served checkpoint: settings, data and escape rate."""
    method = METHODS[name]
    if not isinstance(method, Served) or not method.quantized:
        return None
    file = model_of(job, method) / "morphoquant_calibration.json"
    if not file.is_file():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    kept = {part: report[part] for part in ("settings", "data", "escape_rate") if part in report}
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
