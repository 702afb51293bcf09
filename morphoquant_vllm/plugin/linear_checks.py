"""Refusals of a linear of vLLM's model whose shapes, cuts or bias are not those of the checkpoint's layers."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import RowParallelLinear

from morphoquant_vllm.errors import MorphoQuantError
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


def check_bias(layer: torch.nn.Module, shards: dict[str, LayerSpec]) -> None:
    """Check the source layer's bias: vLLM allocates it uninitialised and does not report a missing one."""
    bias = getattr(layer, "bias", None)
    has = {False: "no bias", True: "a bias"}
    for name, shard in shards.items():
        if shard.bias != (bias is not None):
            raise MorphoQuantError(
                f"{name}: the model has {has[bias is not None]}, the checkpoint has {has[shard.bias]}; "
                "config.json does not belong to these weights"
            )
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise MorphoQuantError(f"{next(iter(shards))}.bias: holds NaN or infinite values; the file is damaged")
