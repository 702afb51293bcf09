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
from morphoquant_vllm.plugin.unloaded_weights import patch_loading, patch_reload, patch_streamer, refuse_partial

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


@pytest.mark.usefixtures("observed", "engine_context")
def test_the_bias_of_a_quantized_layer_is_vllms_to_load() -> None:
    model = Model({"one.weight"})
    model.two.quant_method = MorphoQuantLinearMethod.__new__(MorphoQuantLinearMethod)
    model.two.bias = nn.Parameter(torch.ones(4))
    with pytest.raises(MorphoQuantError, match=r"two\.bias"):
        load(model, QUANT_METHOD)


@pytest.mark.usefixtures("engine_context")
def test_the_streamer_refuses_a_weight_that_no_file_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

    monkeypatch.setattr(RunaiModelStreamerLoader, "load_weights", RunaiModelStreamerLoader.load_weights)
    monkeypatch.setattr(RunaiModelStreamerLoader, "_get_weights_iterator", lambda *arguments: iter(()))
    patch_streamer()
    loader = RunaiModelStreamerLoader.__new__(RunaiModelStreamerLoader)
    place = {"model": "x", "model_weights": "", "revision": None}
    ours, none = (SimpleNamespace(quantization=method, **place) for method in (QUANT_METHOD, None))
    model = Model({"one.weight"})
    with pytest.raises(MorphoQuantError, match=r"two\.weight"):
        loader.load_weights(model, ours)
    assert "load_weights" not in vars(model), "the model is as before"
    loader.load_weights(Model({"one.weight", "two.weight"}), ours)
    loader.load_weights(Model({"one.weight"}), none)


class Waiting:
    """Stands for the two halves of an MLP."""

    def __init__(self) -> None:
        self.reloaded = SimpleNamespace(forget=lambda: self.forgotten.append(True))
        self.forgotten: list[bool] = []


def reloaded(*names: str) -> tuple[nn.Module, Waiting]:
    """A model of two quantized layers, of which `names` were loaded again."""
    mlp, layers = Waiting(), {}
    for name in ("gate_up", "down"):
        method = MorphoQuantLinearMethod.__new__(MorphoQuantLinearMethod)
        method.name, method.loaded_again, method.mixed = name, name in names, False
        method.mlp = mlp  # type: ignore[assignment]
        layers[name] = nn.Module()
        layers[name].quant_method = method  # type: ignore[assignment]
    return nn.ModuleDict(layers), mlp


def test_a_reload_of_some_quantized_layers_is_refused_and_forgotten() -> None:
    model, mlp = reloaded("gate_up")
    with pytest.raises(MorphoQuantError, match="down: the reload brought 1 of 2 quantized layers, and not this one"):
        refuse_partial(model)
    assert mlp.forgotten and not any(layer.quant_method.loaded_again for layer in model.values())
    # vLLM may be told to end once more, or to load 16-bit layers: the engine is as mixed as before.
    with pytest.raises(MorphoQuantError, match="the reload brought 0 of 2 quantized layers"):
        refuse_partial(model)
    for layer in model.values():
        layer.quant_method.loaded_again = True
    refuse_partial(model)
    refuse_partial(model)


@pytest.mark.parametrize("names", [(), ("gate_up", "down")])
def test_a_reload_of_all_or_of_16_bit_layers_alone_ends_well(names: tuple[str, ...]) -> None:
    refuse_partial(reloaded(*names)[0])


def test_vllm_asks_at_the_end_of_a_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    monkeypatch.setattr(layerwise, "finalize_layerwise_processing", lambda model, config: None)
    patch_reload()
    once = layerwise.finalize_layerwise_processing
    patch_reload()
    assert layerwise.finalize_layerwise_processing is once
    with pytest.raises(MorphoQuantError, match="weights of two checkpoints"):
        layerwise.finalize_layerwise_reload(reloaded("down")[0], None)
