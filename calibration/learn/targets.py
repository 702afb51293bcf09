"""What learning aims at: the next token's probabilities in the 16-bit model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.blocks.sample_pass import carry, watched
from calibration.learn.divergence import Divergence
from calibration.learn.head import Head
from calibration.model.block_loader import Blocks


@dataclass(frozen=True)
class Target:
    """What the decoder should give for one sample."""

    # States before the head in the 16-bit model, float32 [M, hidden].
    states: Tensor
    # Tokens that count, bool [M]: their successor is text, and they are not massive.
    counted: Tensor


class Objective:
    """The divergence of the next token's probabilities from those of the 16-bit model."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def divergences(self, last: Tensor, target: Target) -> Tensor:
        """The divergence of each token that counts, by the decoder's last states [M, hidden]."""
        device = self.head.weight.device
        states = self.head.normed(last)[target.counted.to(device)]
        wanted = target.states[target.counted].to(device)
        found: Tensor = Divergence.apply(states, wanted, self.head.weight)
        return found

    def derivatives(self, last: Tensor, target: Target) -> tuple[float, Tensor]:
        """The mean divergence of the tokens that count, and its derivative by the last states."""
        with torch.enable_grad():
            leaf = last.float().requires_grad_()
            mean = self.divergences(leaf, target).sum() / max(1, int(target.counted.sum()))
        return float(mean.detach()), torch.autograd.grad(mean, leaf)[0]


def counted_tokens(modality: Tensor, massive: Tensor, text: int) -> Tensor:
    """Tokens that count, bool [M], by the row of each token [M], massive tokens, and the row of text."""
    counted = torch.zeros_like(massive)
    counted[:-1] = modality.flatten()[1:] == text
    return counted & ~massive


class Pass16Bit:
    """A pass of some samples through the 16-bit decoder.

    `layers_of` gives the quantized linears of a block: names in the checkpoint by names in the block.
    """

    def __init__(
        self, blocks: Blocks, layers_of: Callable[[int], Mapping[str, str]], samples: Sequence[MemoryInput]
    ) -> None:
        self.blocks, self.layers_of, self.samples = blocks, layers_of, samples
        # Of each sample after the last block so far: states [1, M, hidden], and which tokens are massive, bool [M].
        self.states = [sample.hidden for sample in samples]
        self.massive: list[Tensor] = []
        # The size of each linear's outputs by its name in the checkpoint: the root of the median token's mean square.
        self.sizes: dict[str, float] = {}

    def forward(self, index: int) -> None:
        """Carry the states through a block; blocks come in order."""
        module, layers = self.blocks.load(index), self.layers_of(index)
        # Mean squares of each token's outputs [M], one entry per sample.
        squares: dict[str, list[Tensor]] = {}

        def note(name: str, x: Tensor, y: Tensor) -> None:
            squares.setdefault(layers[name], []).append(y.flatten(0, -2).float().square().mean(-1).cpu())

        with watched(module, layers, note):
            self.massive = carry(module, index, self.samples, self.states)
        self.sizes |= {layer: float(torch.cat(parts).median().sqrt()) for layer, parts in squares.items()}
