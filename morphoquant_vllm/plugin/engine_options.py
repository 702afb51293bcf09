"""Refuses options of vLLM by which weights would be loaded without a check, or quantized once more."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from morphoquant_vllm.errors import MorphoQuantError

# Load formats whose loaders tell which weights they loaded (unloaded_weights.py), or load states that were served.
CHECKED = frozenset(
    (
        *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral"),
        *("dummy", "sharded_state", "runai_streamer", "runai_streamer_sharded"),
    )
)
# Load formats that read other files than safetensors, which no check of a checkpoint covers.
PICKLES = {"pt": "*.pt", "npcache": "*.bin"}


def refuse_unchecked_loading(config: VllmConfig | None) -> None:
    """Refuse loaders that do not tell which weights they loaded, and weights of another place than the checked one."""
    if config is None or config.model_config is None:
        return
    form = config.load_config.load_format
    if form in PICKLES:
        raise MorphoQuantError(
            f"--load-format {form}: reads {PICKLES[form]} files, which are not those that were checked; serve with "
            "--load-format auto"
        )
    # Another plugin may register a loader that derives from vLLM's.
    if form not in CHECKED and not isinstance(get_model_loader(config.load_config), DefaultModelLoader):
        raise MorphoQuantError(
            f"--load-format {form}: its loader does not say which weights it loaded; serve with --load-format auto"
        )
    other = getattr(config.model_config, "model_weights", "")
    if other and other != config.model_config.model:
        raise MorphoQuantError(
            f"{other}: weights are checked in the directory of config.json only; download the whole checkpoint, and "
            "serve its directory"
        )


def refuse_online(quantization: QuantizationConfig, layer: torch.nn.Module, prefix: str) -> None:
    """Refuse vLLM's online quantization of a layer that the checkpoint quantizes."""
    online: Any = getattr(quantization, "online_quantization_config", None)
    # Older versions of vLLM compose no two methods.
    if not hasattr(online, "resolve_quant_method_cls"):
        return
    # As vLLM sets it, a moment later.
    online.packed_modules_mapping = quantization.packed_modules_mapping
    if online.resolve_quant_method_cls(type(layer), prefix) is not None:
        raise MorphoQuantError(
            f"--quantization-config: {prefix} is quantized already; name such layers in its `ignore`"
        )
