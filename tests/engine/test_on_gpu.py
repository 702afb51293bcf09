"""Engines on the GPU at hand: layers beside the reference, CUDA graphs, rows of tokens, sleep, two ranks.

Without a GPU each test skips with the reason, and the settings of its engines are built and checked by vLLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import TEXT_PROMPT, Engines
from tests.engine.layers import assert_layers_are_the_reference
from tests.engine.rows import ENGINE as ROWS_ENGINE
from tests.engine.rows import (
    assert_every_token_has_its_row,
    run_jobs,
    served_logprobs,
    shape_of_steps,
    spec_rows,
    without_log_probabilities,
)
from tests.reference_model import Checkpoint

STORED_PREFIX = ("language_model.model.", "thinker.model.")
# Small models: most of the GPU's memory stays free for engines that start beside these.
ON_GPU = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 4, "gpu_memory_utilization": 0.2}
ENGINES: dict[str, dict[str, Any]] = {
    "bfloat16": {**ON_GPU, "enforce_eager": True},
    "float16": {**ON_GPU, "dtype": "float16", "enforce_eager": True},
    "graphs": ON_GPU,
    "sleeps": {**ON_GPU, "enforce_eager": True, "enable_sleep_mode": True},
    # Level 2 drops the weights; they are loaded again.
    "sleeps deeply": {**ON_GPU, "enforce_eager": True, "enable_sleep_mode": True},
    "fastsafetensors": {**ON_GPU, "enforce_eager": True, "load_format": "fastsafetensors"},
    "two ranks": {**ON_GPU, "enforce_eager": True, "tensor_parallel_size": 2},
}
ROWS_ENGINES = {
    "eager": {**ROWS_ENGINE, "dtype": "bfloat16", "gpu_memory_utilization": 0.2},
    "graphs": {**ROWS_ENGINE, "dtype": "bfloat16", "gpu_memory_utilization": 0.2, "enforce_eager": False},
}
GPUS = torch.cuda.device_count()
# vLLM's loader of that name reads onto a GPU only.
FASTSAFETENSORS = find_spec("fastsafetensors") is not None
on_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not GPUS, reason="no GPU is at hand")]
# bfloat16 moves log probabilities of the tiny model by hundredths, and by more at a tie between two codes. Wrong rows
# or weights move nearly every one by tenths.
MEAN_GAP = 0.1


def gpu_test(function: Any) -> Any:
    """A test that needs a GPU."""
    for mark in on_gpu:
        function = mark(function)
    return function


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, omni_checkpoint: Path, media: dict[str, Path], media_text: str
) -> Engines:
    directory = tmp_path_factory.mktemp("gpu engines")
    question = {"prompt": media_text, **{kind: str(path) for kind, path in media.items()}}
    omni = {"model": str(omni_checkpoint), "prompts": [{"prompt_token_ids": TEXT_PROMPT}, question]}
    engines = Engines(directory)
    possible = {"two ranks": GPUS > 1, "fastsafetensors": FASTSAFETENSORS}
    jobs = {name: {**omni, "engine": engine} for name, engine in ENGINES.items() if possible.get(name, True)}
    for name in ("bfloat16", "float16"):
        jobs[name]["capture"] = str(directory / f"{name}.safetensors")
    jobs["sleeps"]["sleep"], jobs["sleeps deeply"]["sleep"] = 1, 2
    engines.run(jobs)
    return engines


@pytest.fixture(scope="module")
def recorded(
    rows_checkpoint: Path, prompts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    passes = {"fresh": {"prompts": prompts, "prompt_logprobs": True}, "again": without_log_probabilities(prompts)}
    jobs = {
        name: {"model": str(rows_checkpoint), "engine": engine, "passes": passes}
        for name, engine in ROWS_ENGINES.items()
    }
    return run_jobs(tmp_path_factory.mktemp("gpu rows"), jobs)


def logprobs(result: dict[str, Any]) -> Tensor:
    return torch.tensor([value for request in result["requests"] for value in request["prompt_logprobs"]])


def mean_gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


@gpu_test
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_and_outputs_inside_the_layers_equal_the_reference(
    started: Engines, checkpoint: Checkpoint, dtype: str
) -> None:
    assert_layers_are_the_reference(started.results[dtype], checkpoint, getattr(torch, dtype), STORED_PREFIX)


@gpu_test
def test_cuda_graphs_give_the_log_probabilities_of_eager_steps(started: Engines) -> None:
    assert started.results["graphs"]["compilation"] != "NONE"
    assert mean_gap(logprobs(started.results["graphs"]), logprobs(started.results["bfloat16"])) < MEAN_GAP


@gpu_test
@pytest.mark.parametrize("name", ["sleeps", "sleeps deeply"])
def test_an_engine_answers_the_same_after_sleep(started: Engines, name: str) -> None:
    result = started.results[name]
    assert result["after_sleep"] == [request["token_ids"] for request in result["requests"]]


@gpu_test
@pytest.mark.skipif(not FASTSAFETENSORS, reason="the package fastsafetensors is not installed")
def test_fastsafetensors_loads_the_same_weights(started: Engines) -> None:
    assert logprobs(started.results["fastsafetensors"]).equal(logprobs(started.results["bfloat16"]))


@gpu_test
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_ranks_give_the_log_probabilities_of_one(started: Engines) -> None:
    assert mean_gap(logprobs(started.results["two ranks"]), logprobs(started.results["bfloat16"])) < MEAN_GAP


@gpu_test
@pytest.mark.parametrize("engine", ROWS_ENGINES)
def test_each_token_takes_its_row_in_chunked_steps_and_behind_cached_prefixes(
    recorded: dict[str, Any], rows_checkpoint: Path, engine: str
) -> None:
    for name in ("fresh", "again"):
        assert_every_token_has_its_row(recorded[engine][name], spec_rows(rows_checkpoint))
        assert shape_of_steps(recorded[engine][name])["chunk starts inside a medium"]
    assert any(request["cached"] > 0 for request in recorded[engine]["again"]["requests"])


@gpu_test
def test_served_output_is_the_references_with_the_same_rows(
    recorded: dict[str, Any], by_modality: Tensor, by_any: Tensor
) -> None:
    served = served_logprobs(recorded["eager"]["fresh"])
    assert mean_gap(served, by_modality) < min(MEAN_GAP, 0.5 * mean_gap(served, by_any))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*ENGINES.values(), *ROWS_ENGINES.values()])
def test_vllm_takes_the_settings_of_each_engine(settings: dict[str, Any], omni_checkpoint: Path) -> None:
    """So that a machine with a GPU does not find a misspelt one."""
    from vllm.engine.arg_utils import EngineArgs

    # vLLM refuses sleep on a CPU.
    settings = {name: value for name, value in settings.items() if GPUS or name != "enable_sleep_mode"}
    arguments = EngineArgs(model=str(omni_checkpoint), **settings)
    assert arguments.create_model_config().quantization == "morphoquant"
