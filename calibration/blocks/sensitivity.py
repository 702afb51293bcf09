"""How much errors of each linear's output matter for the decoder's output: one pass forward and one back, by blocks.

The decoder's last hidden states, each divided by its size, are multiplied by random signs and added up. An error of a
linear's output is multiplied by the derivative of this sum by that output, and squared. On average this is the error of
the last hidden states. So one backward pass measures every linear. One block is in memory at a time, and the states
between the blocks lie in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calibration.blocks.capture import MemoryInput
from calibration.blocks.sample_pass import carry, device_of, given_states, run_block, watched
from calibration.data.token_choice import modality_shares
from calibration.model.block_loader import Blocks
from calibration.processes import Processes
from calibration.quantize.bit_losses import Probe
from calibration.quantize.output_metric import OutputMoment
from calibration.work.durable_files import read_tensors, write_tensors_durably

# Tokens of the passes, about, and no more than are drawn. A longer sample is taken only if there is no shorter one.
BUDGET_TOKENS = 4096
# The fractional parts of this number's multiples, the golden ratio's, divide 0 to 1 evenly, however many there are.
SPREAD = (5**0.5 - 1) / 2


def choose_pass_samples(lengths: Sequence[int], rows: Sequence[frozenset[int]], most: int = BUDGET_TOKENS) -> list[int]:
    """Indices of the samples of the passes, ascending: every modality in turn gives one, for about `most` tokens.

    `lengths` are the tokens of each sample, `rows` the modalities in it.
    """
    # Long samples come last, the shortest first: a pass holds a whole sample's block in memory. The first of the others
    # are spread over the data, which may have one kind of text after the other.
    order = sorted(range(len(lengths)), key=lambda index: (max(lengths[index], most // 2), index * SPREAD % 1))
    queues = {row: [index for index in order if row in rows[index]] for row in sorted(frozenset().union(*rows))}
    chosen: list[int] = []
    total = 0
    while any(queues.values()):
        for queue in queues.values():
            while queue and queue[0] in chosen:
                queue.pop(0)
            if not queue:
                continue
            index = queue.pop(0)
            if not chosen or total + lengths[index] <= most:
                chosen.append(index)
                total += lengths[index]
    return sorted(chosen)


class _Carried(NamedTuple):
    """One sample's pass back through a block."""

    # Tokens that are not massive, bool [M].
    ordinary: Tensor
    # Input and output of each linear, by its name.
    calls: dict[str, tuple[Tensor, Tensor]]
    # Derivatives by the outputs, float32 [M, N].
    of_outputs: dict[str, Tensor]


class Passes:
    """The two passes of some samples over the decoder's blocks; their states lie in `directory` until `clear`."""

    def __init__(self, blocks: Blocks, samples: Sequence[MemoryInput], directory: Path, seed: int) -> None:
        self.blocks, self.samples, self.directory, self.seed = blocks, samples, directory, seed
        # Before the next block of the pass forward, and after the next block of the pass back.
        self.states = [sample.hidden for sample in samples]
        # By block: tokens of each sample whose residual stream is an outlier, which have a row of their own.
        self.outlying: list[list[Tensor]] = []

    def file(self, index: int) -> Path:
        """The file of the states before a block."""
        return self.directory / f"sensitivity-{index:05}.safetensors"

    def forward(self, index: int) -> None:
        """Carry the states through a block; blocks come in order."""
        module = self.blocks.load(index)
        write_tensors_durably(self.file(index), {str(number): state for number, state in enumerate(self.states)})
        self.outlying.append(carry(module, index, self.samples, self.states))

    def start_back_from_projection(self, balance: float) -> None:
        """Replace the last states by the derivatives of their projection; `balance` weighs modalities as the recipe."""
        modality = torch.cat([sample.modality.flatten() for sample in self.samples]).long()
        counts = {int(row): int((modality == row).sum()) for row in modality.unique()}
        weight = torch.zeros(modality.numel(), dtype=torch.float64)
        for row, share in modality_shares(counts, balance).items():
            weight[modality == row] = share / counts[row]
        generator = torch.Generator().manual_seed(self.seed)
        parts = weight.float().split([sample.modality.numel() for sample in self.samples])
        self._take_derivatives(
            [_projected(state, part, generator) for state, part in zip(self.states, parts, strict=True)]
        )

    def start_back(self, derivative: Callable[[MemoryInput, Tensor, Tensor], Tensor]) -> None:
        """Replace the last states by their derivatives.

        `derivative` gives that of a sample, float32 [1, M, hidden], by its massive tokens, bool [M], and last states.
        """
        massive = self.outlying[-1]
        self._take_derivatives([derivative(*each) for each in zip(self.samples, massive, self.states, strict=True)])

    def _take_derivatives(self, found: list[Tensor]) -> None:
        if self.states[0].dtype == torch.float16:
            # Small derivatives would vanish in its narrow range. Only their ratios count.
            largest = max(float(derivative.abs().max()) for derivative in found)
            found = [derivative / largest for derivative in found]
        self.states = [derivative.to(state.dtype) for derivative, state in zip(found, self.states, strict=True)]

    def backward(self, index: int, shards_of: Mapping[str, Sequence[str]]) -> dict[str, Probe]:
        """Carry the derivatives back through a block; the probe of each input, by the names of `shards_of`.

        `shards_of` maps an input's name to its linears' names in the block.
        """
        module = self.blocks.load(index)
        linears = [shard for shards in shards_of.values() for shard in shards]
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in shards_of}
        for ordinary, calls, of_outputs in self._carried_back(module, index, linears):
            for name, shards in shards_of.items():
                gradient = torch.cat([of_outputs[shard] for shard in shards], 1)
                seen[name].append((_flat(calls[shards[0]][0].detach())[ordinary], gradient[ordinary]))
            # The next sample runs before these names get other values.
            del calls, of_outputs
        return {
            name: Probe(
                torch.cat([x for x, _ in seen[name]]),
                torch.cat([gradient for _, gradient in seen[name]]),
                torch.cat([module.get_parameter(f"{shard}.weight").float() for shard in shards]),
            )
            for name, shards in shards_of.items()
        }

    def metrics(self, index: int, linears: Sequence[str]) -> dict[str, Tensor]:
        """Carry the derivatives back through a block; the metrics of these linears' outputs, by name in the block.

        Those of linears that the output does not depend on are missing. Massive tokens count: later ones may depend on
        them above all.
        """
        moments = {name: OutputMoment() for name in linears}
        for carried in self._carried_back(self.blocks.load(index), index, linears):
            for name, moment in moments.items():
                moment.add(carried.of_outputs[name])
            # The next sample runs before this name gets another value.
            del carried
        found = {name: moment.metric() for name, moment in moments.items()}
        return {name: metric for name, metric in found.items() if metric is not None}

    def _carried_back(self, module: nn.Module, index: int, linears: Sequence[str]) -> Iterator[_Carried]:
        """Carry the derivatives of one sample after the other back through a block."""
        states = read_tensors(self.file(index))
        for number, sample in enumerate(self.samples):
            hidden = states[str(number)].to(device_of(module)).requires_grad_()
            calls: dict[str, tuple[Tensor, Tensor]] = {}
            with watched(module, linears, partial(_note, calls)), torch.enable_grad():
                output = run_block(module, sample, index, given_states(sample, index, hidden))
            before, of_outputs = _derivatives(output, self.states[number].to(output), hidden, calls)
            self.states[number] = before.cpu()
            yield _Carried(~self.outlying[index][number].to(hidden.device), calls, of_outputs)
            del calls, of_outputs, output

    def clear(self) -> None:
        """Remove the files."""
        for index in range(len(self.blocks)):
            self.file(index).unlink(missing_ok=True)


def run_passes(
    begin: Callable[[], Passes],
    blocks: int,
    processes: Processes,
    *,
    turn: Callable[[Passes], None],
    back: Callable[[Passes, int], None],
) -> None:
    """Run both passes on the first process: `turn` after the last block, `back` at each block on the way back.

    The other processes wait for each of these steps, and not too long for any.
    """
    passes = begin() if processes.first else None

    def on_first(step: Callable[..., None], *index: int) -> None:
        def action() -> None:
            assert passes is not None
            step(passes, *index)

        processes.broadcast(action)

    for index in range(blocks):
        on_first(Passes.forward, index)
    on_first(turn)
    for index in reversed(range(blocks)):
        on_first(back, index)
    on_first(Passes.clear)


def _note(calls: dict[str, tuple[Tensor, Tensor]], name: str, x: Tensor, y: Tensor) -> None:
    """Note input and output of a linear by its name."""
    calls[name] = x, y


def _projected(state: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Derivative, float32, by the last states [1, M, hidden] of their projection; weight [M] of each token."""
    signs = torch.randint(2, state.shape, generator=generator).float() * 2 - 1
    with torch.enable_grad():
        last = state.float().requires_grad_()
        # Divided by its size, as the norm before the head does. A change as large as the state counts as 1.
        normed = last / last.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total = (normed * signs * weight.sqrt()[:, None]).sum()
    return torch.autograd.grad(total, last)[0]


def _derivatives(
    output: Tensor, of_output: Tensor, hidden: Tensor, calls: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Derivatives by the states before the block, and by each linear's output, float32 [M, N] by the linear's name."""
    wanted = {name: y for name, (_, y) in calls.items()}
    found = torch.autograd.grad(output, [hidden, *wanted.values()], of_output, allow_unused=True)
    filled = [
        torch.zeros_like(by) if value is None else value
        for value, by in zip(found, [hidden, *wanted.values()], strict=True)
    ]
    return filled[0], {name: _flat(value) for name, value in zip(wanted, filled[1:], strict=True)}


def _flat(value: Tensor) -> Tensor:
    return value.flatten(0, -2).float()
