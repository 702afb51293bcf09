"""Learning: the divergence of a student from its teacher, and the steps of Adam that lower it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.student import StudentInput, StudentLinear, integers
from calibration.learn.descent import BETAS, learning_rate_factor
from calibration.learn.divergence import Divergence


@dataclass(frozen=True)
class Rates:
    """What Adam may move a parameter by in one step."""

    # Of the logarithms of activation steps and output scales; of constants, times the output's root mean square.
    scales: float
    # Of latent weights, in codes; 0: weights are fixed.
    weights: float


def last_states(model: Any, window: Sequence[int]) -> Tensor:
    """The states [M, D] of a causal model before its head."""
    states: Tensor = model.model(input_ids=torch.tensor([list(window)]), use_cache=False)[0][0]
    return states


class Learner:
    """A student, its teacher's states on the windows that it learns from, and Adam."""

    def __init__(
        self, student: Any, inputs: Sequence[StudentInput], windows: Sequence[Sequence[int]], teacher: Sequence[Tensor]
    ) -> None:
        self.student, self.inputs, self.windows, self.teacher = student, inputs, windows, teacher
        self.head = student.get_output_embeddings().weight.detach()
        self.linears = [module for module in student.modules() if isinstance(module, StudentLinear)]
        self.start = [integers(linear.latent.detach()).to(torch.int8) for linear in self.linears]

    def divergence(self, window: int) -> Tensor:
        """The student's divergence on one window."""
        states = last_states(self.student, self.windows[window])
        found: Tensor = Divergence.apply(states, self.teacher[window], self.head)
        return found.mean()

    def changed_codes(self) -> float:
        """The share of the weights' codes that differ from the start's."""
        differ = sum(
            int((integers(linear.latent.detach()) != codes).sum())
            for linear, codes in zip(self.linears, self.start, strict=True)
        )
        return differ / sum(codes.numel() for codes in self.start)

    def epochs(self, rates: Rates, count: int) -> Iterator[float]:
        """The mean divergence of each of `count` epochs, as the student learned; a step for each window."""
        optimizer = torch.optim.Adam(self._groups(rates), betas=BETAS, foreach=True)
        base = [group["lr"] for group in optimizer.param_groups]
        steps, done = count * len(self.windows), 0
        for epoch in range(count):
            seen = 0.0
            for window in torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(epoch)).tolist():
                factor = learning_rate_factor(done, steps)
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * factor
                loss = self.divergence(window)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seen, done = seen + float(loss.detach()), done + 1
            yield seen / len(self.windows)

    def _groups(self, rates: Rates) -> list[dict[str, Any]]:
        """Adam's parameters with their rates; all others have no gradient."""
        groups: list[dict[str, Any]] = [{"params": [given.change for given in self.inputs], "lr": rates.scales}]
        sizes = self._output_sizes()
        for linear, size in zip(self.linears, sizes, strict=True):
            groups.append({"params": [linear.change], "lr": rates.scales})
            groups.append({"params": [linear.offset], "lr": rates.scales * size})
            linear.latent.requires_grad_(rates.weights > 0)
        if rates.weights:
            groups.append({"params": [linear.latent for linear in self.linears], "lr": rates.weights})
        return groups

    @torch.no_grad()
    def _output_sizes(self) -> list[float]:
        """The root mean square of each linear's outputs on the first window, without its first token."""
        sizes: dict[nn.Module, float] = {}

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sizes[module] = float(output[0, 1:].square().mean().sqrt())

        handles = [linear.register_forward_hook(note) for linear in self.linears]
        last_states(self.student, self.windows[0])
        for handle in handles:
            handle.remove()
        return [sizes[linear] for linear in self.linears]
