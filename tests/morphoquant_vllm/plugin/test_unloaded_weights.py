"""vLLM's loader on models of this method: a weight that no file gave is refused by name."""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import LoadConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QUANT_METHOD
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod
from morphoquant_vllm.plugin.unloaded_weights import patch_loading

COMPARES_METHODS = "quantized" in signature(DefaultModelLoader.track_weights_loading).parameters


class Model(nn.Module):
    """Two norms, of which the files may hold one."""

    def __init__(self, given: set[str] | None) -> None:
        super().__init__()
        self.given = given
        self.one, self.two = nn.RMSNorm(4), nn.RMSNorm(4)

    def load_weights(self, weights: object) -> set[str] | None:
        return self.given


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DefaultModelLoader, "load_weights", DefaultModelLoader.load_weights)
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda *arguments: ())
    for name in ("_init_ep_weight_filter", "_init_mm_encoder_only_weight_filter"):
        monkeypatch.setattr(DefaultModelLoader, name, lambda *arguments: None, raising=False)
    patch_loading()


def load(model: nn.Module, quantization: str | None, extra: dict[str, object] | None = None) -> None:
    loader = DefaultModelLoader(LoadConfig(model_loader_extra_config=extra or {}))
    loader.counter_before_loading_weights = 0.0
    loader.load_weights(model, SimpleNamespace(quantization=quantization))


@pytest.mark.usefixtures("observed", "engine_context")
def test_a_weight_that_no_file_gave_is_named() -> None:
    refused = r"vLLM's Model has weights that the checkpoint does not hold.*two\.weight"
    with pytest.raises(MorphoQuantError, match=refused):
        load(Model({"one.weight"}), QUANT_METHOD)
    load(Model({"one.weight", "two.weight"}), QUANT_METHOD)


@pytest.mark.usefixtures("observed", "engine_context")
def test_a_model_that_does_not_say_what_it_loaded_is_not_checked() -> None:
    load(Model(None), QUANT_METHOD)


@pytest.mark.usefixtures("observed", "engine_context")
def test_the_users_setting_and_other_methods_stay() -> None:
    load(Model({"one.weight"}), QUANT_METHOD, {"enable_weights_track": False})
    load(Model({"one.weight"}), "fp8")


@pytest.mark.usefixtures("observed", "engine_context")
@pytest.mark.parametrize("method", [MorphoQuantLinearMethod, MorphoQuantExpertsMethod])
def test_quantized_layers_count_their_own_tensors(method: type) -> None:
    model = Model({"one.weight"})
    model.two.quant_method = method.__new__(method)
    load(model, QUANT_METHOD)
    assert torch.equal(model.two.weight, torch.ones(4))


@pytest.mark.usefixtures("observed", "engine_context")
@pytest.mark.skipif(not COMPARES_METHODS, reason="this vLLM leaves out every layer that has a method")
def test_a_linear_in_16_bit_that_no_file_gave_is_named() -> None:
    """It has a method of vLLM's, which may have more to do after loading."""
    model = Model({"one.weight"})
    model.two.quant_method = UnquantizedLinearMethod()
    with pytest.raises(MorphoQuantError, match=r"two\.weight"):
        load(model, QUANT_METHOD)
    model.given = {"one.weight", "two.weight"}
    load(model, QUANT_METHOD)
