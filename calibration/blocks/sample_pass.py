"""Runs one sample, or each of several, through one decoder block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibration.blocks.capture import ADDED, SERVED_ADDED, BlockInput, MemoryInput
from calibration.quantize.massive_tokens import outlying_tokens


def given_states(sample: BlockInput, index: int, hidden: Tensor, *, served: bool = False) -> Tensor:
    """What the model gives block `index`: some models add features of media to the hidden states [1, M, hidden].

    If `served`, the features are those of quantized towers.
    """
    passed = sample.arguments[index]
    added = passed.get(SERVED_ADDED if served and SERVED_ADDED in passed else ADDED)
    return hidden if added is None else hidden + added.to(hidden.device)


def block_arguments(sample: BlockInput, index: int) -> dict[str, Any]:
    """The arguments of block `index` beside the hidden states."""
    return {name: value for name, value in sample.arguments[index].items() if name not in (ADDED, SERVED_ADDED)}


def run_block(module: nn.Module, sample: BlockInput, index: int, given: Tensor) -> Tensor:
    """The output [1, M, hidden] of the block for the states that it is given, on its device."""
    output = module(given.to(device_of(module)), **block_arguments(sample, index))
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@torch.no_grad()
def carry(module: nn.Module, index: int, samples: Sequence[MemoryInput], states: list[Tensor]) -> list[Tensor]:
    """Replace the samples' states [1, M, hidden] before block `index` by those after it, on the CPU.

    Returns each sample's tokens whose states are outliers before or after the block, bool [M].
    """
    norms = []
    for number, sample in enumerate(samples):
        given = given_states(sample, index, states[number])
        states[number] = run_block(module, sample, index, given).cpu()
        sizes = (state.float().norm(dim=-1).flatten().cpu() for state in (given, states[number]))
        norms.append(torch.maximum(*sizes))
    modality = torch.cat([sample.modality.flatten() for sample in samples])
    outlying = outlying_tokens(torch.cat(norms), modality)
    return list(outlying.split([sample.modality.numel() for sample in samples]))


@contextmanager
def watched(module: nn.Module, names: Iterable[str], note: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `note` with name, input and output of each linear that runs, by its name in the block."""

    def hook(name: str, linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        note(name, inputs[0], output)

    handles = [module.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def device_of(module: nn.Module) -> torch.device:
    """The device of a block's weights."""
    return next(module.parameters()).device
