"""Reorders the channels between an MLP's gate_up_proj and down_proj to down_proj's channel order, in memory only.

silu(gate) * up treats each channel separately: rows of gate and up may be in any order if the columns of down follow.
In down_proj's channel order its quantizer reads its input sequentially, without a gather. Each output of a linear
depends only on its row of weights, so no bit of the model's output changes. The checkpoint's files keep the source's
numbering. Adapters (LoRA) use that numbering too, so nothing is moved if they are enabled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from morphoquant_vllm.format.layers import INPUT_TENSORS
from morphoquant_vllm.plugin.reload import ReloadedPair

GATE_UP, DOWN = ".mlp.gate_up_proj", ".mlp.down_proj"
# Models whose MLP in vLLM is exactly gate_up_proj, silu(gate) * up and down_proj. The decoders of multimodal models
# have separate entries: vLLM passes them their section of config.json.
MODEL_TYPES = frozenset(
    (
        *("llama", "mistral", "ministral3", "phi3", "qwen2", "qwen3", "qwen2_5_vl", "qwen2_5_vl_text"),
        *("qwen3_vl", "qwen3_vl_text", "qwen3_5", "qwen3_5_text"),
        *("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_text"),
    )
)


class MlpOrder:
    """State that gate_up_proj and down_proj of one MLP share on one rank while they are loaded."""

    def __init__(self) -> None:
        self.reloaded = ReloadedPair()
        # vLLM's down_proj, until gate_up_proj has been processed.
        self.down: torch.nn.Module | None = None
        # down_proj's channel order on this rank, int64 [K], between the processing of gate_up_proj and of down_proj.
        self._order: Tensor | None = None

    def order_for_outputs(self, gate_up: torch.nn.Module, out_features: int) -> Tensor | None:
        """down_proj's channel order for gate_up_proj with `out_features` outputs, int64 [K]; None if they stay.

        down_proj must follow, by `order_of_inputs`. Nothing is moved if its tensors are gone, or if its channel order
        is not a permutation, which the checks of down_proj refuse.
        """
        down, self.down = self.down, None
        stored = getattr(down, "channel_order", None)
        if down is None or stored is None or not are_pair(gate_up, down) or 2 * stored.numel() != out_features:
            return None
        order = stored.data.long() - int(down.tp_rank) * stored.numel()  # type: ignore[arg-type]
        if not torch.equal(order.sort().values, torch.arange(order.numel(), device=order.device)):
            return None
        self._order = order
        return order

    def order_of_inputs(self) -> Tensor | None:
        """The order of down_proj's input channels, int64 [K]; None for the source's order. May be called once."""
        order, self._order = self._order, None
        return order


def are_pair(gate_up: torch.nn.Module, down: torch.nn.Module) -> bool:
    """Whether down_proj's inputs on a rank are the channels of gate's and up's outputs there.

    transformers' plans may gather all outputs and split them again: then a rank has other channels of each.
    """
    return (
        isinstance(gate_up, MergedColumnParallelLinear)
        and len(gate_up.output_sizes) == 2
        and not gate_up.gather_output
        and isinstance(down, RowParallelLinear)
        and down.input_is_parallel
        and (gate_up.tp_size, gate_up.tp_rank) == (down.tp_size, down.tp_rank)
    )


def both_halves(order: Tensor) -> Tensor:
    """The outputs of gate and of up, int64 [2K], for down_proj's channel order, int64 [K]."""
    return torch.cat((order, order + order.numel()))


def reorder_outputs(tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """A (fused) layer's tensors with its outputs in the order `order` [N]; tensors of the input are unchanged."""
    return {
        name: value if name in INPUT_TENSORS else value.index_select(-1 if name == "absorbed_bias" else 0, order)
        for name, value in tensors.items()
    }


def reorder_inputs(tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """A layer's tensors for an input whose channels come in the layer's channel order `order`, int64 [K]."""
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return {
        **tensors,
        "activation_step": tensors["activation_step"][order],
        "modality_mask": tensors["modality_mask"][:, order],
        "centre": tensors["centre"][:, order],
        "massive_channel": position[tensors["massive_channel"].long()].int(),
        "channel_order": torch.arange(order.numel(), dtype=torch.int32, device=order.device),
    }
