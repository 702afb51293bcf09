"""A decoder block in memory, and the samples that run through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.blocks.capture import ADDED, SERVED_ADDED, BlockInput
from calibration.blocks.served_linear import TokenRows
from calibration.model.loading import Blocks
from calibration.quantize.observation import SampleCollector, run_observed


@dataclass(frozen=True)
class LoadedBlock:
    """A block in memory, and the samples of this process that run through it."""

    module: nn.Module
    index: int
    count: int
    inputs: Sequence[BlockInput]
    # Rows of the running sample's tokens, for the linears that are already quantized.
    serving: TokenRows
    # Noted when it is loaded: a block may have no parameters but those of its linears, which are replaced.
    device: torch.device

    def given(self, entry: BlockInput, hidden: Tensor, *, served: bool = False) -> Tensor:
        """What the model gives the block of the hidden states before it: some add features of media to them."""
        passed = entry.arguments[self.index]
        added = passed.get(SERVED_ADDED if served and SERVED_ADDED in passed else ADDED)
        return hidden if added is None else hidden + added.to(hidden.device)

    def modality(self) -> Tensor:
        """The modality of each token of the running sample."""
        assert self.serving.modality is not None
        return self.serving.modality

    def run(
        self,
        entry: BlockInput,
        hidden: Tensor,
        collectors: Mapping[str, SampleCollector],
        rows: Tensor,
        *,
        served: bool = False,
        stop: bool = False,
    ) -> Tensor:
        """The output for one sample of a stream, on the CPU; the input if the run stops early."""
        self.serving.modality = entry.modality
        output = run_observed(
            self.module,
            self.given(entry, hidden, served=served).to(self.device),
            {name: value for name, value in entry.arguments[self.index].items() if name not in (ADDED, SERVED_ADDED)},
            collectors,
            rows.to(self.device),
            entry.positions.to(self.device),
            stop=stop,
        )
        return hidden if output is None else output.cpu()


def load_block(blocks: Blocks, index: int, inputs: Sequence[BlockInput], serving: TokenRows) -> LoadedBlock:
    """The block `index` with its weights; only the result refers to them."""
    module = blocks.load(index)
    return LoadedBlock(module, index, len(blocks), inputs, serving, next(module.parameters()).device)
