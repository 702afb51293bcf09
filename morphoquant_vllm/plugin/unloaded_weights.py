"""Refuses weights that leave a part of vLLM's model as it was built, or a reload that leaves some quantized layers.

vLLM compares a model's parameters with those that its files gave, but by default only if nothing is quantized. Here
the same check runs for models of this method. Quantized layers are left out: each counts its own tensors. vLLM 0.30 and
0.31 leave out every layer that has a method, so linears in 16 bit, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QUANT_METHOD
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

# Mark of the functions that ask for the checks.
_MARK = "refuses_unloaded"
# Arguments of vLLM's check for quantized models; older versions take none.
_CHECK_SETTINGS = (
    {"quantized": True} if "quantized" in signature(DefaultModelLoader.track_weights_loading).parameters else {}
)


def patch_loading() -> None:
    """Let vLLM's loader check models of this method as it checks 16-bit ones, unless the user has set that."""
    original = DefaultModelLoader.load_weights
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def load_weights(self: DefaultModelLoader, model: torch.nn.Module, model_config: ModelConfig) -> None:
        if model_config.quantization == QUANT_METHOD and self.enable_weights_track is None:
            # These belong to the one loader of this model.
            self.enable_weights_track = True
            self.track_weights_loading = functools.partial(_check, self)
        with _keeping_refusals(model):
            original(self, model, model_config)

    setattr(load_weights, _MARK, True)
    DefaultModelLoader.load_weights = load_weights


def patch_streamer() -> None:
    """Let vLLM's Run:ai streamer check models of this method; by itself it compares nothing."""
    original = RunaiModelStreamerLoader.load_weights
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def load_weights(self: RunaiModelStreamerLoader, model: Any, model_config: ModelConfig) -> None:
        if model_config.quantization != QUANT_METHOD:
            original(self, model, model_config)
            return
        with _keeping_refusals(model), _noting(model) as loaded:
            original(self, model, model_config)
            _check(self, model, loaded[0], **_CHECK_SETTINGS)

    setattr(load_weights, _MARK, True)
    RunaiModelStreamerLoader.load_weights = load_weights


@contextmanager
def _noting(model: Any) -> Iterator[list[set[str] | None]]:
    """The names that `model.load_weights` returns while the block lasts, for a loader that drops them."""
    own, noted = model.load_weights, list[set[str] | None]()

    def load_weights(weights: Any) -> set[str] | None:
        noted.append(own(weights))
        return noted[-1]

    # An attribute of the instance hides the class's method.
    model.load_weights = load_weights
    try:
        yield noted
    finally:
        del model.load_weights


def patch_reload() -> None:
    """Let vLLM's reload refuse to end if it brought some quantized layers and not others."""
    # Imported here: it may be patched already.
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_processing as original

    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def finalize(model: torch.nn.Module, model_config: ModelConfig) -> None:
        original(model, model_config)
        refuse_partial(model)

    setattr(finalize, _MARK, True)
    layerwise.finalize_layerwise_processing = finalize


def refuse_partial(model: torch.nn.Module) -> None:
    """Refuse a reload after which quantized layers of two checkpoints would be served together."""
    methods = [
        method
        for layer in model.modules()
        if isinstance(method := getattr(layer, "quant_method", None), MorphoQuantLinearMethod)
    ]
    missing = [method.name for method in methods if not method.loaded_again]
    count = len(methods) - len(missing)
    # It stays so until one reload brings them all, however often vLLM ends a reload.
    mixed = bool(missing) and (bool(count) or any(method.mixed for method in methods))
    for method in methods:
        method.loaded_again, method.mixed = False, mixed
        if method.mlp is not None:
            method.mlp.reloaded.forget()
    if mixed:
        raise MorphoQuantError(
            f"{missing[0]}: the reload brought {count} of {len(methods)} quantized layers, and not this one; the "
            "engine now holds weights of two checkpoints: load a whole one, or start a new server"
        )


def _keeping_refusals(model: torch.nn.Module) -> AbstractContextManager[None]:
    """The context of a model's quantization config that makes a refusal the last line of the log."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MorphoQuantLinearMethod | MorphoQuantExpertsMethod):
            return method.keep_refusal()
    return nullcontext()


def _check(loader: BaseModelLoader, model: torch.nn.Module, loaded: set[str] | None, **settings: Any) -> None:
    """vLLM's check, for all but our quantized layers; MorphoQuantError if a weight has no tensor."""
    if loaded is not None:
        loaded = loaded | _counted_by_layers(model)
    try:
        DefaultModelLoader.track_weights_loading(loader, model, loaded, **settings)
    except ValueError as problem:
        raise MorphoQuantError(
            f"vLLM's {type(model).__name__} has weights that the checkpoint does not hold, so it would compute another "
            f"model than transformers does: {problem}"
        ) from problem


def _counted_by_layers(model: torch.nn.Module) -> set[str]:
    """Names of the parameters of quantized layers, which refuse a missing tensor themselves."""
    return {
        f"{name}.{parameter}"
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "quant_method", None), MorphoQuantLinearMethod | MorphoQuantExpertsMethod)
        for parameter, _ in layer.named_parameters()
        # vLLM registers it, and no layer counts it.
        if parameter != "bias"
    }
