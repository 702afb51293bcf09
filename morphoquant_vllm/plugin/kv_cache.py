"""The scales of an FP8 cache of keys and values, made of the magnitudes that calibration measured.

They are used if the user asks for such a cache. A `kv_cache_scheme` in the config would turn vLLM's `auto` into FP8 for
everyone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)
# The format whose range ends at LARGEST. vLLM takes no scales for the other one, fp8_e5m2.
SCALED = ("fp8", "fp8_e4m3")
LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
# Below it a scale may be 0 in float32, by which a cache cannot divide.
SMALLEST = 1e-30
# Magnitudes above those of calibration, which are not clipped. A float loses no precision by it.
HEADROOM = 2.0


class CalibratedCacheMethod(BaseKVCacheMethod):
    """Gives vLLM's attention the scales of one block, whose magnitudes are `found`."""

    def __init__(self, config: QuantizationConfig, found: AttentionRange) -> None:
        super().__init__(config)
        self.found = found

    def create_weights(self, layer: torch.nn.Module) -> None:
        """Nothing: no tensor of the checkpoint holds a scale."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().create_weights(layer)
        for part, magnitude in (("q", self.found.query), ("k", self.found.key), ("v", self.found.value)):
            getattr(layer, f"{part}_scale").data.fill_(scale(magnitude))
        super().process_weights_after_loading(layer)


def scale(magnitude: float) -> float:
    """The number by which a cache divides values of at most this magnitude; 1 if all were 0 or nearly so."""
    return magnitude * HEADROOM / LARGEST if magnitude >= SMALLEST else 1.0


def cache_method(
    config: QuantizationConfig, layer: torch.nn.Module, prefix: str, ranges: Mapping[str, AttentionRange]
) -> CalibratedCacheMethod | None:
    """The method of an attention layer; None if its cache is not FP8, or if calibration saw none of this block."""
    if not isinstance(layer, Attention) or layer.kv_cache_dtype not in SCALED:
        return None
    block = max((name for name in ranges if prefix.startswith(f"{name}.")), key=len, default=None)
    if block is None:
        logger.warning_once("MorphoQuant: the checkpoint has no scales for an FP8 cache of some layers; they take 1")
        return None
    logger.info_once("MorphoQuant: the FP8 cache takes the scales of calibration")
    return CalibratedCacheMethod(config, ranges[block])
