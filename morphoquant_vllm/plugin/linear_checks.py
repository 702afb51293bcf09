"""Refusals of a linear of vLLM's model whose shapes, cuts or bias are not those of the checkpoint's layers."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format import values
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.plugin.parameters import check_ranks


def check_shapes(
    layer: torch.nn.Module, input_size: int, name: str, layer_spec: LayerSpec, spec: QuantizationSpec
) -> None:
    """Check K, `input_size`, and how vLLM cuts the layer among ranks, against the settings of layer `name`."""
    if input_size != layer_spec.in_features:
        raise MorphoQuantError(
            f"{name}: the model has K = {input_size}, the checkpoint {layer_spec.in_features}; "
            "config.json does not belong to these weights"
        )
    row_parallel = isinstance(layer, RowParallelLinear)
    # A row-parallel checkpoint layer fits a layer of which vLLM gives every rank the whole K, too.
    if row_parallel and layer_spec.parallel != "row":
        raise MorphoQuantError(
            f"{name}: the checkpoint has parallel '{layer_spec.parallel}', but vLLM splits this layer "
            "otherwise; calibrate again"
        )
    size = int(layer.tp_size)  # type: ignore[arg-type]
    if row_parallel:
        check_ranks(spec, name, layer_spec, size)


def check_outputs(layer: torch.nn.Module, output_size: int, shards: dict[str, LayerSpec]) -> None:
    """Check N of a layer's shards: of a larger tensor vLLM's loaders take the first outputs, and say nothing."""
    built: list[int] = list(getattr(layer, "output_sizes", None) or [output_size])
    if isinstance(layer, QKVParallelLinear):
        # Ranks that outnumber the heads of keys and values have copies of them.
        built[1:] = [size // layer.num_kv_head_replicas for size in built[1:]]
    stored = [shard.out_features for shard in shards.values()]
    if sum(built) == sum(stored):
        return
    # One tensor of the file may be several of vLLM's outputs.
    pairs = zip(shards, stored, built, strict=True) if len(stored) == len(built) else ()
    first = [(name, own, wanted) for name, own, wanted in pairs if own != wanted]
    name, own, wanted = first[0] if first else (next(iter(shards)), sum(stored), sum(built))
    raise MorphoQuantError(
        f"{name}: the model has N = {wanted}, the checkpoint {own}; config.json does not belong to these weights"
    )


def check_bias_presence(layer: torch.nn.Module, shards: dict[str, LayerSpec]) -> None:
    """Check the source layer's bias: vLLM allocates it uninitialised and does not report a missing one."""
    bias = getattr(layer, "bias", None)
    has = {False: "no bias", True: "a bias"}
    for name, shard in shards.items():
        if shard.bias != (bias is not None):
            raise MorphoQuantError(
                f"{name}: the model has {has[bias is not None]}, the checkpoint has {has[shard.bias]}; "
                "config.json does not belong to these weights"
            )
    if bias is not None:
        values.check_bias(f"{next(iter(shards))}.bias", bias)
