"""The numerics' records of tensors as a checkpoint stores them."""

import torch
from torch import Tensor

from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record
from morphoquant_vllm.schema import INPUT_TENSORS


def activation_of(tensors: dict[str, Tensor]) -> ActivationRecord:
    """The activation record of one layer's stored tensors."""
    return activation_record(*(tensors[name] for name in INPUT_TENSORS))


def weight_of(*shards: dict[str, Tensor]) -> WeightRecord:
    """One weight record of the stored shards of a (fused) layer, all blocks of K together."""
    return weight_record(
        torch.cat([shard["weight_codes"] for shard in shards]),
        torch.cat([shard["weight_scale"] for shard in shards]),
        torch.cat([shard["absorbed_bias"] for shard in shards], dim=2),
    )


def rank_part(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What one of `ranks` tensor-parallel ranks holds of a row-parallel layer's tensors."""
    along_k = {"weight_codes": 1, "weight_scale": 1, "activation_step": 0, "channel_order": 0}
    along_k |= {"modality_mask": 1, "centre": 1}
    blocks = dict.fromkeys(("massive_channel", "massive_low", "massive_high", "absorbed_bias"), 0)
    part = {"gain": tensors["gain"]}
    for name, dimension in (along_k | blocks).items():
        part[name] = tensors[name].chunk(ranks, dimension)[rank]
    first = rank * part["channel_order"].numel()
    return part | {name: part[name] - first for name in ("channel_order", "massive_channel")}
