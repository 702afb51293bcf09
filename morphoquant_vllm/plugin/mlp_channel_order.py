"""The channels between an MLP's gate_up_proj and down_proj, numbered in memory as down_proj takes them.

silu(gate) * up treats every channel alike and by itself: rows of gate and up may stand in any order if the columns of
down follow. In down_proj's own channel order its quantizer reads its input from one end to the other and gathers
nothing. Each output of a linear comes from its own row of weights, so no bit of the model's output changes. The
checkpoint's files keep the source's numbering, in which adapters (LoRA) are written too: with them nothing is moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.format.schema import INPUT_TENSORS

GATE_UP, DOWN = ".mlp.gate_up_proj", ".mlp.down_proj"
# Models whose MLP, in vLLM, is gate_up_proj, silu(gate) * up and down_proj, with nothing else between them; the
# decoders of the multimodal ones under their own names, as vLLM passes their part of config.json on.
MODEL_TYPES = frozenset(
    (
        *("llama", "qwen2", "qwen3", "qwen2_5_vl", "qwen2_5_vl_text"),
        *("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_text"),
    )
)


class Intermediate:
    """What gate_up_proj and down_proj of one MLP know of each other while they are loaded, on one rank."""

    def __init__(self) -> None:
        # vLLM's layer, until gate_up_proj has been processed.
        self.down: torch.nn.Module | None = None
        # down_proj's channel order on this rank, int64 [K], from when gate_up_proj takes it until down_proj follows.
        self._order: Tensor | None = None

    def rows(self, out_features: int) -> Tensor | None:
        """The order of rows for gate_up_proj with `out_features` outputs, int64; None where they stay.

        down_proj must follow, by `columns`. Where its tensors are gone or are no permutation (which its own
        checks refuse) nothing is moved.
        """
        down, self.down = self.down, None
        stored = getattr(down, "channel_order", None)
        if down is None or stored is None or 2 * stored.numel() != out_features:
            return None
        order = stored.data.long() - int(down.tp_rank) * stored.numel()  # type: ignore[arg-type]
        if not torch.equal(order.sort().values, torch.arange(order.numel(), device=order.device)):
            return None
        self._order = order
        return torch.cat((order, order + order.numel()))

    def columns(self) -> Tensor | None:
        """The order in which down_proj's input comes, int64 [K]; None where it is the source's. Asked for once."""
        order, self._order = self._order, None
        return order


def reorder_outputs(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """A (fused) layer's tensors with its outputs in the order `rows` [N]; those of its input as they are."""
    return {
        name: value if name in INPUT_TENSORS else value.index_select(-1 if name == "absorbed_bias" else 0, rows)
        for name, value in tensors.items()
    }


def reorder_inputs(tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """A layer's tensors for an input whose channels come in its own channel order, int64 [K]."""
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
