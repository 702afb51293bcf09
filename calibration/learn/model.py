"""The quantized decoder that learns: passes forward and back over its blocks, of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from calibration.blocks.capture import MemoryInput
from calibration.blocks.sample_pass import device_of, given_states, run_block
from calibration.blocks.served_linear import TokenRows
from calibration.learn.changes import Changes
from calibration.learn.linear import LearningInput, LearningLinear
from calibration.model.block_loader import Blocks
from morphoquant_vllm.format.layers import LayerSpec, tensor_specs
from morphoquant_vllm.format.schema import QuantizationSpec

# Loads a stored tensor of a layer of a block: block, layer, tensor.
LoadStored = Callable[[int, str, str], Tensor]


class Kept(Enum):
    """What learning keeps in memory; each costs more memory, and takes less time, than the one before."""

    # One block at a time: it is loaded and run again for the pass back.
    ONE_BLOCK = "one block"
    # All blocks; each is run again for the pass back.
    BLOCKS = "all blocks"
    # Also the graph of a whole pass forward.
    GRAPHS = "all blocks and their graphs"


@dataclass(frozen=True)
class Escapes:
    """Codes of tokens that are not massive: those outside 4 bits, and all."""

    escaped: int = 0
    counted: int = 0

    def plus(self, escaped: int, counted: int) -> Escapes:
        """These and more."""
        return Escapes(self.escaped + escaped, self.counted + counted)

    @property
    def rate(self) -> float:
        """The share of escapes."""
        return self.escaped / max(1, self.counted)


@dataclass(frozen=True)
class _Block:
    """A block in memory, whose quantized linears learn."""

    module: nn.Module
    index: int
    # By the input's name.
    inputs: Mapping[str, LearningInput]
    serving: TokenRows

    def run(self, sample: MemoryInput, hidden: Tensor) -> Tensor:
        self.serving.modality = sample.modality
        given = given_states(sample, self.index, hidden, served=True)
        return run_block(self.module, sample, self.index, given)

    def forget(self) -> None:
        for given in self.inputs.values():
            given.forget()


class LearningDecoder:
    """The decoder with the linears of the finished blocks, which learn `changes`.

    `layers_of` gives the quantized linears of a block: names in the checkpoint by names in the block. By `memory` the
    blocks stay in memory once they are loaded, and a pass forward keeps what the pass back needs. Else the pass back
    runs each block again.
    """

    def __init__(
        self,
        blocks: Blocks,
        layers_of: Callable[[int], Mapping[str, str]],
        load: LoadStored,
        spec: QuantizationSpec,
        changes: Changes,
        memory: Kept,
    ) -> None:
        self.blocks, self.layers_of, self.load, self.spec, self.changes = blocks, layers_of, load, spec, changes
        self.memory = memory
        self._kept: dict[int, _Block] = {}

    @torch.no_grad()
    def last_states(self, samples: Sequence[MemoryInput]) -> tuple[list[Tensor], dict[str, Escapes]]:
        """The states [1, M, hidden] of each sample after the last block, and the escapes of each input by its name.

        Each block is loaded once.
        """
        states: list[Tensor] = [sample.served for sample in samples]
        escapes: dict[str, Escapes] = {}
        for index in range(len(self.blocks)):
            block = self._block(index)
            for place, sample in enumerate(samples):
                states[place] = block.run(sample, states[place])
                for name, given in block.inputs.items():
                    escapes[name] = escapes.get(name, Escapes()).plus(*given.escapes())
                block.forget()
        return states, escapes

    def states(self, sample: MemoryInput) -> list[Tensor]:
        """The states [1, M, hidden] of a sample before each block and after the last one, for `back`."""
        states = [sample.served]
        with torch.set_grad_enabled(self.memory is Kept.GRAPHS):
            for index in range(len(self.blocks)):
                block = self._block(index)
                states.append(block.run(sample, states[-1]))
                block.forget()
        return states

    def back(self, sample: MemoryInput, states: Sequence[Tensor], by_last: Tensor) -> None:
        """Add the gradients of `changes`, by `states` and the derivative by the last of them [1, M, hidden]."""
        if self.memory is Kept.GRAPHS:
            states[-1].backward(by_last.to(states[-1]))
            return
        gradient = by_last
        for index in reversed(range(len(self.blocks))):
            block = self._block(index)
            hidden = states[index].to(device_of(block.module)).requires_grad_()
            with torch.enable_grad():
                output = block.run(sample, hidden)
            output.backward(gradient.to(output))
            block.forget()
            assert hidden.grad is not None
            gradient = hidden.grad

    def _block(self, index: int) -> _Block:
        if index in self._kept:
            return self._kept[index]
        module, serving = self.blocks.load(index), TokenRows(self.spec.any_row)
        device, inputs = device_of(module), dict[str, LearningInput]()
        for place, layer in self.layers_of(index).items():
            settings = self.spec.layers[layer]
            tensors = {name: self.load(index, layer, name) for name in self._stored(settings)}
            changes = self.changes.of(layer, settings)
            if settings.shared_input not in inputs:
                inputs[settings.shared_input] = LearningInput(tensors, changes.step, serving, device)
            bias = getattr(module.get_submodule(place), "bias", None)
            module.set_submodule(place, LearningLinear(tensors, bias, inputs[settings.shared_input], changes))
        block = _Block(module, index, inputs, serving)
        if self.memory is not Kept.ONE_BLOCK:
            self._kept[index] = block
        return block

    def _stored(self, settings: LayerSpec) -> Sequence[str]:
        return list(tensor_specs(settings, len(self.spec.rows), self.spec.tensor_parallel))
