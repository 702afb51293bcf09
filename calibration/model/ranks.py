"""Among how many ranks a checkpoint can be divided: groups and attention heads must stay whole. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import ExpertsSpec, LayerSpec, allowed_tensor_parallel

TENSOR_PARALLEL_CHOICES = (8, 4, 2, 1)
# absorbed_bias of each expert's down_proj is stored once for each rank.
EXPERTS_TENSOR_PARALLEL_CHOICES = (2, 1)


def largest_tensor_parallel(
    layers: Mapping[str, LayerSpec], experts: Mapping[str, ExpertsSpec], decoder_config: Mapping[str, Any]
) -> int:
    """The largest size that leaves groups of row-parallel layers whole and divides the attention heads."""
    choices = EXPERTS_TENSOR_PARALLEL_CHOICES if experts else TENSOR_PARALLEL_CHOICES
    first = [layer for name, settings in experts.items() for layer in settings.expert_layers(name, 0).values()]
    shapes = {(layer.in_features, layer.group_size) for layer in (*layers.values(), *first) if layer.parallel == "row"}
    for size in choices:
        if _divides_heads(size, decoder_config) and all(size in allowed_tensor_parallel(*shape) for shape in shapes):
            return size
    return 1


def check_heads(size: int, decoder_config: Mapping[str, Any]) -> None:
    """Raise MorphoQuantError unless `size` ranks get whole attention heads."""
    if not _divides_heads(size, decoder_config):
        heads, kv_heads = _head_counts(decoder_config)
        linear = "".join(f" and {count} {kind}" for kind, count in _linear_heads(decoder_config).items())
        raise MorphoQuantError(
            f"tensor_parallel = {size}: {heads} attention heads and {kv_heads} key-value heads{linear} cannot be "
            f"divided among {size} ranks; leave it at auto"
        )


def _divides_heads(size: int, decoder_config: Mapping[str, Any]) -> bool:
    """Whether `size` ranks get whole attention heads; key-value heads may be copied if there are fewer than ranks.

    The heads of linear attention are never copied.
    """
    heads, kv_heads = _head_counts(decoder_config)
    linear = _linear_heads(decoder_config).values()
    return (
        heads % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
        and not any(count % size for count in linear)
    )


def _linear_heads(decoder_config: Mapping[str, Any]) -> dict[str, int]:
    """Heads of linear attention by their kind in words; empty for a decoder without it."""
    kinds = {"key heads of linear attention": "key", "value heads of linear attention": "value"}
    counts = {kind: decoder_config.get(f"linear_num_{name}_heads") for kind, name in kinds.items()}
    return {kind: count for kind, count in counts.items() if isinstance(count, int)}


def _head_counts(decoder_config: Mapping[str, Any]) -> tuple[int, int]:
    heads = decoder_config["num_attention_heads"]
    return heads, decoder_config.get("num_key_value_heads") or heads
