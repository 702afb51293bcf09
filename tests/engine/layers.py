"""Compares tensors captured inside an engine's layers with the torch reference on the checkpoint's tensors."""

from __future__ import annotations

from typing import Any

import torch

from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.linear import matmul, output_bound
from tests.records import activation_of, weight_of
from tests.reference_model import Checkpoint

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}


def captured_layers(result: dict[str, Any]) -> list[str]:
    """vLLM's names of the layers that were captured."""
    return sorted({name.rsplit(".", 1)[0] for name in result["captured"]})


def stored_shards(layer: str, prefix: tuple[str, str]) -> list[str]:
    """Checkpoint names behind a layer of vLLM's; `prefix` is (vLLM's, the checkpoint's)."""
    stem, last = (prefix[1] + layer.removeprefix(prefix[0])).rsplit(".", 1)
    return [f"{stem}.{shard}" for shard in FUSED.get(last, (last,))]


def seen(
    result: dict[str, Any], layer: str, checkpoint: Checkpoint, prefix: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, codes and output of a captured layer; input and output with the checkpoint's numbers of channels."""
    x, codes, y = (result["captured"][f"{layer}.{part}"] for part in ("x", "codes", "y"))
    if bool(result["captured"][f"{layer}.renumbered"]):
        (down,) = stored_shards(layer.replace("gate_up_proj", "down_proj"), prefix)
        order = checkpoint.layer(down)["channel_order"].long()
        if layer.endswith("down_proj"):
            x = torch.empty_like(x).index_copy_(1, order, x)
        else:
            y = torch.empty_like(y).index_copy_(1, torch.cat((order, order + order.numel())), y)
    return x, codes, y


def assert_layers_are_the_reference(
    result: dict[str, Any], checkpoint: Checkpoint, dtype: torch.dtype, prefix: tuple[str, str]
) -> None:
    """Every layer's codes are the reference's, and every output lies within the bound for other backends."""
    layers = captured_layers(result)
    assert {name for layer in layers for name in stored_shards(layer, prefix)} == set(checkpoint.spec.layers)
    for layer in layers:
        x, codes, y = seen(result, layer, checkpoint, prefix)
        modality = result["captured"][f"{layer}.modality"]
        assert x.dtype is y.dtype is dtype
        shards = [checkpoint.layer(name) for name in stored_shards(layer, prefix)]
        activation, weight = activation_of(shards[0]), weight_of(*shards)
        rows = token_rows(x, modality, activation)
        expected = act_quant(x, rows, activation)
        assert torch.equal(codes, expected), layer
        bias = torch.cat([shard["bias"] for shard in shards]) if "bias" in shards[0] else None
        reference = matmul(expected, rows, weight, activation.gain, bias).to(x.dtype)
        gap = (y.double() - reference.double()).abs()
        assert bool((gap <= output_bound(expected, rows, weight, activation.gain, reference)).all()), layer
