"""Runs one sample through one decoder block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibration.blocks.capture import ADDED, SERVED_ADDED, MemoryInput


def given_states(sample: MemoryInput, index: int, hidden: Tensor, *, served: bool = False) -> Tensor:
    """What the model gives block `index`: some models add features of media to the hidden states [1, M, hidden].

    If `served`, the features are those of quantized towers.
    """
    passed = sample.arguments[index]
    added = passed.get(SERVED_ADDED if served and SERVED_ADDED in passed else ADDED)
    return hidden if added is None else hidden + added.to(hidden.device)


def run_block(module: nn.Module, sample: MemoryInput, index: int, given: Tensor) -> Tensor:
    """The output [1, M, hidden] of the block for the states that it is given, on its device."""
    passed = {name: value for name, value in sample.arguments[index].items() if name not in (ADDED, SERVED_ADDED)}
    output = module(given.to(device_of(module)), **passed)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def device_of(module: nn.Module) -> torch.device:
    """The device of a block's weights."""
    return next(module.parameters()).device
