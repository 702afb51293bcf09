"""Builds vLLM's model without weights, and compares its linears with the layers of a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod


def check_model(directory: Path, spec: QuantizationSpec) -> str:
    """The name of vLLM's class of the 16-bit model in `directory`, whose linears are all layers of `spec`.

    Raises MorphoQuantError naming the first layer that vLLM builds under no name, with another shape, with another
    direction of tensor parallelism or with another bias. Other errors mean that vLLM cannot build the model. Needs a
    process of its own.
    """
    config = EngineArgs(model=str(directory), enforce_eager=True, load_format="dummy").create_engine_config()
    config.quant_config = MorphoQuantConfig(spec)
    model = _empty_model(config)
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    built = {
        id(layer)
        for method in methods
        if isinstance(method, MorphoQuantLinearMethod)
        for layer in method.shards.values()
    }
    built |= {id(method.experts) for method in methods if isinstance(method, MorphoQuantExpertsMethod)}
    _refuse_missing(model, "linear", spec.layers, built)
    _refuse_missing(model, "list of experts", spec.experts, built)
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), MorphoQuantLinearMethod):
            _refuse_other_bias(type(model).__name__, module)
    return type(model).__name__


def _refuse_other_bias(model: str, linear: torch.nn.Module) -> None:
    built = getattr(linear, "bias", None) is not None
    for name, settings in linear.quant_method.shards.items():  # type: ignore[union-attr, operator]
        if settings.bias != built:
            has, have = ("a bias", "no bias") if built else ("no bias", "a bias")
            raise MorphoQuantError(f"{name}: vLLM's {model} has {has} here, the weights {have}; it cannot serve them")


def _refuse_missing(model: torch.nn.Module, kind: str, listed: Mapping[str, object], built: set[int]) -> None:
    """Refuse settings, by their names in the file, of which no method was built."""
    missing = [name for name, settings in listed.items() if id(settings) not in built]
    if missing:
        raise MorphoQuantError(
            f"{missing[0]}: vLLM's {type(model).__name__} has no {kind} of this name that can be quantized "
            f"({len(missing)} of {len(listed)} are missing); leave it in 16 bit: {ignored(missing, listed)}"
        )


def ignored(missing: Sequence[str], listed: Collection[str]) -> str:
    """Flags whose patterns match what is missing and nothing else that is listed."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in missing)
    found = {name.rpartition(".")[2] for name in listed if name not in missing}
    patterns = [f"*.{end}" for end in ends] if found.isdisjoint(ends) else missing
    return " ".join(f"--ignore '{pattern}'" for pattern in patterns)


def _empty_model(config: VllmConfig) -> torch.nn.Module:
    """vLLM's model on the meta device, on one rank."""
    with tempfile.TemporaryDirectory() as directory, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1, backend="gloo")
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(vllm_config=config)
