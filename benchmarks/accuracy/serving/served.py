"""Our method as users run it: `morphoquant calibrate`, then vLLM, each in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy.kept.code import REPOSITORY, calibration_code, code_of
from benchmarks.accuracy.methods import Part, Served
from benchmarks.accuracy.settings import Settings
from benchmarks.common.files import digest, file_digest, write_atomically
from benchmarks.common.machine import versions
from calibration.data.data_files import load_conversations
from calibration.settings.recipe import read_recipe
from calibration.work.fingerprint import content_hash
from morphoquant_vllm.errors import MorphoQuantError

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # In an eager engine only the ranking of prompt tokens would be compiled, which takes seconds in every process.
    "TORCH_COMPILE_DISABLE": "1",
}


def checkpoint_path(settings: Settings, model: Path, data: Sequence[Path], recipe: Mapping[str, Any]) -> Path:
    """Path of the checkpoint of these settings; its name is a hash of everything that it depends on."""
    key = {
        "model": file_digest([model]),
        "data": data_digest(data),
        # Whole: a setting that is named and one that is left at the same default make the same checkpoint.
        "recipe": read_recipe(overrides=recipe).model_dump(mode="json"),
        "versions": versions(),
        "code": code_of(calibration_code()),
    }
    return settings.work / "checkpoints" / digest(key)[:16]


def data_digest(data: Sequence[Path]) -> str:
    """Hash of calibration data: of texts, conversations and the media that these name."""
    return _data_digest(tuple(data))


@cache
def _data_digest(data: tuple[Path, ...]) -> str:
    return digest([content_hash(item) for item in load_conversations(data)])


def recipe_of(settings: Settings, method: Served | Part, max_samples: int) -> dict[str, Any]:
    """The method's recipe, with the settings that make it see the same samples as the baselines."""
    shared = {"max_samples": max_samples, "window_tokens": settings.window_tokens, "seed": settings.seed}
    return {**shared, **method.recipe}


def calibrate(output: Path, model: Path, data: Sequence[Path], recipe: Mapping[str, Any]) -> Path:
    """Run the console command unless its checkpoint exists; MorphoQuantError with its message if it fails."""
    if (output / "config.json").is_file():
        return output
    # JSON is YAML.
    recipe_file = output.with_suffix(".yaml")
    write_atomically(recipe_file, json.dumps(dict(recipe)) + "\n")
    flags = [part for path in data for part in ("--data", str(path))]
    command = [str(Path(sys.executable).with_name("morphoquant")), "calibrate", str(model), *flags]
    command += ["--output", str(output), "--recipe", str(recipe_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MorphoQuantError(f"morphoquant calibrate failed: {_last_line(done.stderr)}")
    return output


def run_engine(directory: Path, name: str, job: Mapping[str, Any]) -> None:
    """Run the worker on `job`, with its log in `directory`; MorphoQuantError with the log's name if it fails."""
    job_file, log = directory / f"{name}.json", directory / f"{name}.log"
    write_atomically(job_file, json.dumps(dict(job)))
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.accuracy.serving.worker", str(job_file.resolve())],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
        )
    if done.returncode:
        last = _last_line(log.read_text(errors="replace"))
        raise MorphoQuantError(f"vLLM ended with exit status {done.returncode}; see {log}: {last}")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
