"""Refuses a checkpoint that leaves a weight of vLLM's model as it was built, which would serve wrong answers.

vLLM compares a model's parameters with those that its files gave, but by default only if nothing is quantized. Here
the same check runs for models of this method. Quantized layers are left out: each counts its own tensors. vLLM 0.30 and
0.31 leave out every layer that has a method, so linears in 16 bit, too.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QUANT_METHOD
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

# Mark of the function that asks for the check.
_MARK = "refuses_unloaded"


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


def _keeping_refusals(model: torch.nn.Module) -> AbstractContextManager[None]:
    """The context of a model's quantization config that makes a refusal the last line of the log."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MorphoQuantLinearMethod | MorphoQuantExpertsMethod):
            return method.keep_refusal()
    return nullcontext()


def _check(loader: DefaultModelLoader, model: torch.nn.Module, loaded: set[str] | None, **settings: Any) -> None:
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
    }
