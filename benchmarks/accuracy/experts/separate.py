"""Routed experts as linears: transformers merges those of a block into two parameters, which hooks do not see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MERGED = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """One expert; `gate_up` [2I, K] and `down` [K, I] are views of the merged parameters."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)

    def forward(self, x: Tensor) -> Tensor:
        """y [M, K] of x [M, K]."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class SeparateExperts(nn.Module):
    """The experts of a block; called like the module of transformers that it replaces."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        for index, (own_gate_up, own_down) in enumerate(zip(gate_up, down, strict=True)):
            self.add_module(str(index), Expert(own_gate_up, own_down))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y [M, K] of hidden_states [M, K]; index and weights [M, T] are those of the router."""
        y = torch.zeros_like(hidden_states)
        for index, expert in self.named_children():
            tokens, slots = (top_k_index == int(index)).nonzero(as_tuple=True)
            if tokens.numel():
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, slots, None]
                y.index_add_(0, tokens, weighted.to(y.dtype))
        return y


def separate(model: nn.Module) -> None:
    """Replace every module of merged experts in `model` by SeparateExperts, which hold the same memory."""
    for name, module in list(model.named_modules()):
        merged = [getattr(module, part, None) for part in MERGED]
        if all(isinstance(part, nn.Parameter) and part.ndim == 3 for part in merged):
            model.set_submodule(name, SeparateExperts(*(part.data for part in merged if part is not None)))


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of routed experts by name: merged, separate or quantized. All are called with the router's choice."""
    suffix = ".mlp.experts"
    return {name: module for name, module in model.named_modules() if name.endswith(suffix)}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
