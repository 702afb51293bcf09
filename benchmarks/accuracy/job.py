"""The common work of the benchmarks here: run methods that are missing from the cache, and read cached results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import parts, simulation
from benchmarks.accuracy.experts.separate import separate
from benchmarks.accuracy.kept import code
from benchmarks.accuracy.kept.cache import Cache
from benchmarks.accuracy.methods import METHODS, Part, Peer, Served, Simulated, known_methods, obstacle
from benchmarks.accuracy.peers import environment
from benchmarks.accuracy.serving import objective, served
from benchmarks.accuracy.settings import EVALUATOR_VERSION, Settings
from benchmarks.common.files import digest, file_digest
from benchmarks.common.machine import versions
from benchmarks.models import decoder
from benchmarks.models.widths import linear_widths


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
    # The result of a model in this process on an evaluation set.
    evaluate: Callable[[Any, str], dict[str, Any]]
    # Which evaluation sets vLLM is asked, and which are evaluated in this process.
    engine: tuple[str, ...]
    process: tuple[str, ...]

    @property
    def cache(self) -> Cache:
        return Cache(self.settings.work / "results")


def sets_of(job: Job, name: str) -> list[str]:
    """The evaluation sets that a method has results on.

    vLLM evaluates a served method on `job.engine`; its checkpoint is loaded into this process for the others.
    """
    if isinstance(METHODS[name], Served):
        return list(dict.fromkeys([*job.engine, *job.process]))
    return list(job.process)


def _threshold_file(job: Job, tau: float) -> Path:
    sample = {"max_samples": job.max_samples, "window_tokens": job.settings.window_tokens, "tau": tau}
    found = {"model": file_digest([job.model]), "data": served.data_digest(job.calibration), **sample}
    return job.settings.work / "thresholds" / f"{digest({**found, 'code': code.code_of(code.OBJECTIVE)})[:16]}.json"


def _make_threshold(job: Job, tau: float) -> None:
    path = _threshold_file(job, tau)
    if not path.is_file():
        size = job.settings.window_tokens
        seen = objective.input_dispersions(job.model, job.calibration, size, job.max_samples, simulation.FULL_MASK)
        objective.write_threshold(path, objective.network_threshold(seen, tau))


def recipe_of(job: Job, method: Served | Part) -> dict[str, Any] | None:
    """The recipe of a method's checkpoint; None if the network's threshold is not made yet."""
    recipe = served.recipe_of(job.settings, method, job.max_samples)
    if isinstance(method, Part) or method.network_tau is None:
        return recipe
    threshold = objective.read_threshold(_threshold_file(job, method.network_tau))
    return None if threshold is None else {**recipe, "dispersion_threshold": threshold}


def model_of(job: Job, method: Served | Part) -> Path | None:
    """Directory of a method's model; a checkpoint may still have to be made. None: its recipe too."""
    if isinstance(method, Served) and not method.quantized:
        return job.model
    recipe = recipe_of(job, method)
    return None if recipe is None else served.checkpoint_path(job.settings, job.model, job.calibration, recipe)


def _made(job: Job, method: Served | Part) -> Path:
    """Directory of a method's model, made unless it is there."""
    if isinstance(method, Served) and method.network_tau is not None:
        _make_threshold(job, method.network_tau)
    directory, recipe = model_of(job, method), recipe_of(job, method)
    assert directory is not None and recipe is not None
    if directory != job.model:
        served.calibrate(directory, job.model, job.calibration, recipe)
    return directory


def key(job: Job, name: str, evaluation: str) -> dict[str, Any] | None:
    """Everything a result depends on; None for a method whose checkpoint is not made yet.

    Methods are known by their settings and checkpoints, not by their names: a renamed one keeps its results.
    """
    method, settings = METHODS[name], job.settings
    found = {
        "benchmark": job.benchmark,
        "evaluator": EVALUATOR_VERSION,
        "kind": type(method).__name__,
        "evaluation": job.evaluations[evaluation],
        "seed": settings.seed,
        "versions": versions(),
    }
    if isinstance(method, Simulated):
        found |= {"method": asdict(method), "model": file_digest([job.model]), "code": code.code_of(code.SIMULATION)}
        if method.calibrated:
            sample = {"max_samples": job.max_samples, "window_tokens": settings.window_tokens}
            found |= {"data": served.data_digest(job.calibration), **sample}
        return found
    if isinstance(method, Peer):
        return {**found, "weights": _peer_key(job, method)}
    directory = model_of(job, method)
    if directory is None or not (directory / "config.json").is_file():
        return None
    found["model"] = file_digest([directory])
    if isinstance(method, Part):
        return {**found, "part": method.part, "source": file_digest([job.model]), "code": code.code_of(code.PARTS)}
    if evaluation not in job.engine:
        return {**found, "code": code.code_of(code.PARTS)}
    return {**found, "dtype": settings.dtype, "code": code.code_of(code.SERVING) if method.quantized else None}


def load(job: Job, name: str, evaluation: str) -> dict[str, Any] | None:
    """The cached result of a method on an evaluation set, or None."""
    found = key(job, name, evaluation)
    return job.cache.load(found) if found is not None else None


def made(job: Job, name: str) -> dict[str, list[str]]:
    """The machines and commits that made a method's results in the cache, in the order of their names."""
    found: dict[str, set[str]] = {"machine": set(), "commit": set()}
    for evaluation in sets_of(job, name):
        known = key(job, name, evaluation)
        if known is None or job.cache.load(known) is None:
            continue
        for kind, value in job.cache.made(known).items():
            found[kind] |= {value} if value else set()
    return {kind: sorted(values) for kind, values in found.items()}


def results(job: Job) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, evaluation set, result) of every result in the cache with the present settings."""
    for name in METHODS:
        for evaluation in sets_of(job, name):
            result = load(job, name, evaluation)
            if result is not None:
                yield name, evaluation, result


def left_out(job: Job, names: Iterable[str], evaluations: Iterable[str]) -> dict[str, str]:
    """Those of the methods that the model cannot have, with the reason. Results in the cache need no run."""
    known, widths, wanted = known_methods(job.benchmark), linear_widths(job.model), list(evaluations)
    found = {}
    for name in names:
        reason = obstacle(METHODS[name], widths, job.settings.peers)
        if name not in known:
            found[name] = f"not a method of the benchmark {job.benchmark}"
        elif reason is not None and missing_of(job, name, wanted):
            found[name] = reason
    return found


def run(job: Job, name: str, wanted: Iterable[str]) -> None:
    """Make the results of a method on those of the evaluation sets `wanted` that it has and the cache lacks."""
    method = METHODS[name]
    if isinstance(method, Simulated):
        missing = missing_of(job, name, wanted)
        if missing:
            _simulate(job, method, missing)
        return
    if isinstance(method, Peer):
        missing = missing_of(job, name, wanted)
        if missing:
            _peer(job, method, missing)
        return
    directory = _made(job, method)
    missing = missing_of(job, name, wanted)
    asked = job.engine if isinstance(method, Served) else ()
    if any(evaluation in asked for evaluation in missing):
        tasks = {evaluation: found for evaluation, found in missing.items() if evaluation in asked}
        _serve(job, name, directory, tasks)
    rest = {evaluation: found for evaluation, found in missing.items() if evaluation not in asked}
    if rest:
        _reload(job, method, directory, rest)


def missing_of(job: Job, name: str, wanted: Iterable[str]) -> dict[str, Any]:
    """Keys of those of the evaluation sets `wanted` that the method has and the cache lacks."""
    own = set(sets_of(job, name))
    keys = {evaluation: key(job, name, evaluation) for evaluation in wanted if evaluation in own}
    return {evaluation: found for evaluation, found in keys.items() if job.cache.load(found or {}) is None}


def _serve(job: Job, name: str, directory: Path, missing: Mapping[str, Any]) -> None:
    description = {
        "benchmark": job.benchmark,
        "model": str(directory.resolve()),
        "dtype": job.settings.dtype,
        "seed": job.settings.seed,
        "cache": str(job.cache.directory.resolve()),
        "tasks": [{"key": found, **job.described(evaluation)} for evaluation, found in missing.items()],
    }
    served.run_engine(job.settings.work / "engines", f"{job.benchmark}-{name}", description)


def _simulate(job: Job, method: Simulated, missing: Mapping[str, Any]) -> None:
    model = decoder.load(job.model)
    separate(model)
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


def _peer_key(job: Job, method: Peer) -> dict[str, Any]:
    sample = {"max_samples": job.max_samples, "window_tokens": job.settings.window_tokens, "seed": job.settings.seed}
    own = {"method": asdict(method), "model": file_digest([job.model]), "data": served.data_digest(job.calibration)}
    return {**own, **sample, "code": code.code_of((environment.SCRIPTS[method.tool], Path(decoder.__file__)))}


def _peer(job: Job, method: Peer, missing: Mapping[str, Any]) -> None:
    python = job.settings.peers[method.tool]
    size = job.settings.window_tokens
    inputs = decoder.calibration_inputs(job.model, job.calibration, size, job.max_samples)
    samples = [sample["input_ids"][0].tolist() for sample in inputs]
    request = environment.Request(method.version, method.group_size, job.settings.seed, method.options, samples)
    weights = job.settings.work / "peers" / f"{digest(_peer_key(job, method))[:16]}.safetensors"
    environment.write_weights(python, method.tool, job.model, request, weights)
    model = decoder.load(job.model)
    prefix = decoder.architecture_of(job.model)[0].block_module
    wanted = [f"{prefix}.{name}" for name in decoder.linears_of(model.get_submodule(prefix))]
    environment.put_weights(model, weights, wanted)
    for evaluation, found in missing.items():
        job.cache.store(found, {**job.evaluate(model, evaluation), "beyond": {}})


def _reload(job: Job, method: Served | Part, directory: Path, missing: Mapping[str, Any]) -> None:
    part = method.part if isinstance(method, Part) else None
    model = parts.load(directory) if part is None else parts.load_part(directory, job.model, part)
    for evaluation, found in missing.items():
        job.cache.store(found, {**job.evaluate(model, evaluation), "beyond": {}})
