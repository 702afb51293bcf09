"""Reaches the token embeddings to which a model class passes no quantization config, so that their tokens have rows.

vLLM lets a plugin put its own class in the place of a pluggable layer. This class adds nothing but the hook of the
modality bus, and only in a model of this method. If another plugin has replaced the embedding, its class stays.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from morphoquant_vllm.format.schema import QUANT_METHOD
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)
# vLLM finds a pluggable layer by the name of its class.
_NAME = VocabParallelEmbedding.__name__


class ObservedEmbedding(VocabParallelEmbedding):
    """vLLM's embedding; without a quantization config of its own, it shows its tokens to its engine's modality bus."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        quantization: Any = None if config is None else config.quant_config
        if quantization is None or quantization.get_name() != QUANT_METHOD:
            return
        if type(self.quant_method) is UnquantizedEmbeddingMethod:
            quantization.modality_bus().attach(self, passed=False)


def replace_embedding() -> None:
    """Let vLLM build ObservedEmbedding for its embedding, unless another plugin has put its own there."""
    if _NAME not in op_registry_oot:
        PluggableLayer.register_oot(ObservedEmbedding, name=_NAME)
    elif op_registry_oot[_NAME] is not ObservedEmbedding:
        logger.info_once(
            "MorphoQuant: another plugin replaces vLLM's %s; tokens of models that pass it no quantization config are "
            "quantized by row 'any'",
            _NAME,
        )
