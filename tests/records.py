"""The numerics' records of tensors as a checkpoint stores them."""

import torch
from torch import Tensor

from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, scale_scheme_of
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record


def activation_of(tensors: dict[str, Tensor]) -> ActivationRecord:
    """The activation record of one layer's stored tensors."""
    return activation_record(*(tensors[name] for name in INPUT_TENSORS))


def weight_of(*shards: dict[str, Tensor]) -> WeightRecord:
    """One weight record of the stored shards of a (fused) layer, all blocks of K together."""
    names = OUTPUT_TENSORS[scale_scheme_of(shards[0])]
    along_n = {name: 2 if name == "absorbed_bias" else 0 for name in names}
    return weight_record(*(torch.cat([shard[name] for shard in shards], along_n[name]) for name in names))


def rank_part(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """One rank's tensors of a row-parallel layer, of `ranks` tensor-parallel ranks."""
    along_k = {"weight_codes": 1, "activation_step": 0, "channel_order": 0, "modality_mask": 1, "centre": 1}
    along_k |= {name: 1 for name in ("weight_scale", "weight_level") if name in tensors}
    blocks = dict.fromkeys(("massive_channel", "massive_low", "massive_high", "absorbed_bias"), 0)
    part = {name: tensors[name] for name in ("gain", "weight_channel_scale") if name in tensors}
    for name, dimension in (along_k | blocks).items():
        part[name] = tensors[name].chunk(ranks, dimension)[rank]
    first = rank * part["channel_order"].numel()
    return part | {name: part[name] - first for name in ("channel_order", "massive_channel")}
