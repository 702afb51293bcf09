"""Captures the inputs of the decoder blocks: embeddings and towers run once on every sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calibration.data.rendering import Sample
from morphoquant_vllm.errors import MorphoQuantError

# Key among a block's arguments of the features that the model adds to the hidden states before the block.
ADDED = "added"
# Key of the same features in the served stream, if they are others: those of a quantized tower.
SERVED_ADDED = "served_added"


class BlockInput(Protocol):
    """One calibration sample between two decoder blocks: in memory as MemoryInput, or in files as work.DiskInput.

    modality int32 [M] is the row of each token, positions int64 are the drawn tokens. hidden and served are the states
    before the next block, [1, M, hidden] on the CPU. They are those of the 16-bit stream and of the served stream.
    """

    modality: Tensor
    positions: Tensor

    @property
    def hidden(self) -> Tensor: ...
    @property
    def served(self) -> Tensor: ...
    @property
    def arguments(self) -> Sequence[Mapping[str, Any]]:
        """The model's other arguments of each block, such as positions and mask.

        The keys ADDED and SERVED_ADDED are this project's: the block does not take them.
        """

    def write_hidden(self, value: Tensor) -> None:
        """Store the block's output in the 16-bit model, for the next block; samples come in order."""

    def write_served(self, value: Tensor) -> None:
        """Store the output of the quantized block, for the next block; samples come in order."""


@dataclass
class MemoryInput:
    """A BlockInput in memory; blocks with the same arguments share them."""

    modality: Tensor
    positions: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    served: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: list[Mapping[str, Any]] = field(default_factory=list)

    def write_hidden(self, value: Tensor) -> None:
        self.hidden = value

    def write_served(self, value: Tensor) -> None:
        self.served = value


@torch.no_grad()
def capture_block_inputs(
    model: Any,
    blocks: Sequence[nn.Module],
    samples: Sequence[Sample],
    positions: Sequence[Tensor],
    *,
    tuple_output: bool = False,
) -> Iterator[MemoryInput]:
    """Run embeddings and towers on each sample in turn, and yield the inputs of the decoder blocks.

    The blocks and the lm_head are skipped, so neither needs weights. Skipping is safe because a block's output does not
    change the other arguments of the next block. `positions` are each sample's drawn tokens. `tuple_output` says that
    the blocks return a tuple. Raises MorphoQuantError naming the sample if a token id has no row in the embedding.
    """
    embedding = model.get_input_embeddings().weight
    model.lm_head = nn.Identity()
    _check_token_ids(samples, embedding.shape[0])
    for sample, chosen in zip(samples, positions, strict=True):
        entry = MemoryInput(sample.modality, chosen)
        with skipped_blocks(blocks, entry, tuple_output=tuple_output):
            model(**_to_model(sample.inputs, embedding.device, embedding.dtype), use_cache=False)
        yield entry


def serve_towers(entry: MemoryInput, again: MemoryInput) -> None:
    """Begin the served stream of a sample with what quantized towers gave it, captured `again`."""
    entry.served = again.hidden
    # Blocks with the same arguments share them.
    entry.arguments = [
        {**passed, SERVED_ADDED: served[ADDED]} if ADDED in served else passed
        for passed, served in zip(entry.arguments, again.arguments, strict=True)
    ]


def _check_token_ids(samples: Sequence[Sample], vocabulary: int) -> None:
    for sample in samples:
        largest = int(sample.inputs["input_ids"].max())
        if largest >= vocabulary:
            raise MorphoQuantError(
                f"{sample.source}: token id {largest}, but the model's embedding has {vocabulary} tokens; "
                "the tokenizer belongs to another model: copy the tokenizer of this model into its directory"
            )


@contextmanager
def skipped_blocks(blocks: Sequence[nn.Module], entry: MemoryInput, *, tuple_output: bool = False) -> Iterator[None]:
    """Make the blocks record their arguments in `entry` and return zeros.

    A block after the first then gets exactly the features that the model adds between blocks, or the zeros themselves.
    """
    passed: list[Tensor] = []

    def record(index: int, names: list[str]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
            arguments |= dict(zip(names, positional, strict=False))
            if index == 0:
                entry.hidden = entry.served = hidden_states.cpu()
                passed[:] = [torch.zeros_like(hidden_states)]
            elif hidden_states is not passed[0]:
                arguments[ADDED] = hidden_states
            entry.arguments.append(arguments)
            return (passed[0],) if tuple_output else passed[0]

        return forward

    for index, block in enumerate(blocks):
        # The first argument is the hidden states.
        names = list(inspect.signature(block.forward).parameters)[1:]
        # An attribute of the instance hides the class's method and leaves the module's hooks and flags alone.
        block.forward = record(index, names)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _to_model(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Move inputs to the device; pixels and audio features are cast to `dtype`, lists of seconds are not."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() and value.dim() > 1 else value.to(device)
        for name, value in inputs.items()
    }
