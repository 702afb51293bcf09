"""The weights of a block's layers in the files, and quantized modules in the places of the model's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.model.experts import PROJECTIONS, StoredExperts, load_expert
from calibration.model.source import Source
from calibration.quantize.layer import QuantizedLayer
from morphoquant_vllm.errors import MorphoQuantError


def load_weight(source: Source, layer: str) -> Tensor:
    """The weight of a linear; MorphoQuantError if it holds NaN or infinite values."""
    weight = source.load(f"{layer}.weight")
    _check_finite(layer, weight)
    return weight


def expert_loader(source: Source, stored: StoredExperts) -> Callable[[int], dict[str, Tensor]]:
    """A function that gives the weights of one expert by projection; MorphoQuantError as for `load_weight`."""

    def load(expert: int) -> dict[str, Tensor]:
        weights = load_expert(source, stored, expert, PROJECTIONS)
        for kind, weight in weights.items():
            _check_finite(stored.projection(expert, kind), weight)
        return weights

    return load


def replace(block: nn.Module, place: str, module: nn.Module) -> None:
    """Put a module into a place of the block, by its name there."""
    parent, _, name = place.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def replace_linear(block: nn.Module, place: str, layer: QuantizedLayer, serving: TokenRows) -> None:
    """Let the quantized layer compute in the place of the block's linear."""
    old = block.get_submodule(place)
    weight = next(old.parameters())
    bias = old.bias if isinstance(old.bias, Tensor) else None
    replace(block, place, ServedLinear(layer.tensors, bias, serving, weight.device, weight.dtype))


def _check_finite(layer: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise MorphoQuantError(f"{layer}.weight: holds NaN or infinite values; the source model is damaged")
