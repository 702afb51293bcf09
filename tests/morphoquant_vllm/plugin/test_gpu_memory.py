"""Sleep and offload, on workers and configs without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.worker import gpu_worker

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin import gpu_memory
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.gpu_memory import patch_sleep, refuse_offload


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The levels at which vLLM's own worker slept."""
    found: list[int] = []
    monkeypatch.setattr(gpu_worker.Worker, "sleep", lambda self, level=1: found.append(level))
    patch_sleep()
    return found


def worker(method: object) -> Any:
    layer = torch.nn.Linear(2, 2)
    layer.quant_method = method  # type: ignore[assignment]
    return SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Sequential(layer)))


def test_only_experts_refuse_and_only_level_two(slept: list[int]) -> None:
    experts = MorphoQuantExpertsMethod.__new__(MorphoQuantExpertsMethod)
    gpu_worker.Worker.sleep(worker(experts))
    gpu_worker.Worker.sleep(worker(None), 2)
    with pytest.raises(MorphoQuantError, match="sleep level 2 would lose the weights of quantized experts; sleep with"):
        gpu_worker.Worker.sleep(worker(experts), level=2)
    assert slept == [1, 2]


def test_it_is_wrapped_once(slept: list[int]) -> None:
    once = gpu_worker.Worker.sleep
    patch_sleep()
    assert gpu_worker.Worker.sleep is once


def test_weights_that_should_lie_on_the_cpu_are_refused() -> None:
    config = VllmConfig()
    refuse_offload(config)
    refuse_offload(None)
    config.offload_config.uva.cpu_offload_gb = 4
    with pytest.raises(
        MorphoQuantError, match="--cpu-offload-gb and --offload-group-size do not move quantized layers"
    ):
        refuse_offload(config)
    config.offload_config.uva.cpu_offload_gb = 0
    config.offload_config.prefetch.offload_group_size = 2
    with pytest.raises(MorphoQuantError, match="serve without them"):
        refuse_offload(config)


def test_counters_of_a_users_tiles_refuse_level_two_on_a_gpu(slept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from morphoquant_vllm.gpu import adding_launch

    kept = adding_launch.counters_of(torch.device("cpu"), 4)
    assert adding_launch.has_counters() and not kept.memory.any()
    gpu_worker.Worker.sleep(worker(None), 2)
    monkeypatch.setattr(gpu_memory, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    gpu_worker.Worker.sleep(worker(None), 1)
    with pytest.raises(MorphoQuantError, match="sleep level 2 would lose the counters of tiles with `adds_splits`"):
        gpu_worker.Worker.sleep(worker(None), 2)
    assert slept == [2, 1]
    del kept
    assert not adding_launch.has_counters()
