"""vLLM's weight checker, on workers without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker import gpu_worker

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod
from morphoquant_vllm.plugin.weight_checker import patch_weight_checker

pytestmark = pytest.mark.skipif(
    not hasattr(gpu_worker.Worker, "reset_weights"), reason="this vLLM has no checker of weights"
)


@pytest.fixture
def reset(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The workers whose weights vLLM itself reset."""
    found: list[Any] = []
    monkeypatch.setattr(gpu_worker.Worker, "reset_weights", found.append)
    monkeypatch.setattr(gpu_worker.Worker, "compute_weight_checksums", lambda self: {"a": "1"})
    patch_weight_checker()
    return found


def worker(method: object) -> Any:
    layer = torch.nn.Linear(2, 2)
    layer.quant_method = method  # type: ignore[assignment]
    return SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: torch.nn.Sequential(layer)))


@pytest.mark.parametrize("method", [MorphoQuantLinearMethod, MorphoQuantExpertsMethod])
def test_models_with_quantized_layers_refuse(method: type, reset: list[Any]) -> None:
    for name in ("reset_weights", "compute_weight_checksums"):
        with pytest.raises(MorphoQuantError, match=r"does not see the weights of quantized layers.*morphoquant verify"):
            getattr(gpu_worker.Worker, name)(worker(method.__new__(method)))
    assert reset == []


def test_other_models_are_checked(reset: list[Any]) -> None:
    other = worker(None)
    assert gpu_worker.Worker.compute_weight_checksums(other) == {"a": "1"}
    gpu_worker.Worker.reset_weights(other)
    assert reset == [other]


def test_it_is_wrapped_once(reset: list[Any]) -> None:
    once = gpu_worker.Worker.reset_weights
    patch_weight_checker()
    assert gpu_worker.Worker.reset_weights is once
