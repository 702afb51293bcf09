"""The updates of learning: Adam on one sample after the other, and the judgement of other samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.learn.extent import Chosen, Extent
from calibration.learn.model import LearningDecoder
from calibration.learn.targets import Objective, Target

BETAS = (0.9, 0.95)
# Updates over which the learning rate rises, and the share of all updates after which it falls. The mean of the changes
# over the updates after it is judged in the end: single updates scatter about it.
WARM_UP, FALL_AFTER = 5, 0.5
# The rate of escapes falls about as this power of an input's steps. At once at most the largest ratio is undone.
ESCAPE_POWER, LARGEST_RATIO = 4.0, 1.5


def learning_rate_factor(update: int, updates: int) -> float:
    """The factor of the learning rate at an update: it rises at first, and falls to nearly nothing in the end."""
    rise = min(1.0, (update + 1) / WARM_UP)
    return rise * min(1.0, (updates - update) / (updates * (1 - FALL_AFTER)))


@dataclass(frozen=True)
class Judgement:
    """What judging samples say: the mean divergence of their tokens, and the rate of escapes by input."""

    divergence: float
    escape_rates: dict[str, float]


class Descent:
    """Lowers the divergence of a decoder from the 16-bit model, one sample an update."""

    def __init__(
        self,
        decoder: LearningDecoder,
        objective: Objective,
        chosen: Chosen,
        read: Callable[[int], tuple[MemoryInput, Target]],
        seed: int,
        extent: Extent,
    ) -> None:
        """`read` gives a sample by its index, and its target; `seed` decides the order of samples.

        `extent` has the learning rate, and how often the judging samples judge.
        """
        self.decoder, self.objective, self.chosen, self.read = decoder, objective, chosen, read
        self.extent = extent
        generator, count = torch.Generator().manual_seed(seed), len(chosen.learned)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-chosen.updates // count))])
        self.order = [chosen.learned[place] for place in order[: chosen.updates].tolist()]
        self.leaves = decoder.changes.parameters()
        self.adam = torch.optim.Adam(list(self.leaves.values()), lr=extent.learning_rate, betas=BETAS)
        # Of the leaves, over the updates after FALL_AFTER of all.
        self.mean = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in self.leaves.items()}

    @property
    def updates(self) -> int:
        """The number of all updates."""
        return len(self.order)

    def update(self, index: int) -> float:
        """Learn from one sample. Returns its mean divergence before the update."""
        sample, target = self.read(self.order[index])
        states = self.decoder.states(sample)
        divergence, by_last = self.objective.derivatives(states[-1][0].detach(), target)
        self.adam.zero_grad()
        # float16 would lose derivatives of a mean over tokens. A power of two changes no bit of the other types.
        size = _power_of_two(float(by_last.abs().max()))
        self.decoder.back(sample, states, by_last[None] / size)
        for group in self.adam.param_groups:
            group["lr"] = self.extent.learning_rate * learning_rate_factor(index, self.updates)
        gradients = [leaf.grad.mul_(size) for leaf in self.leaves.values() if leaf.grad is not None]
        # One that is not finite would spoil all later updates.
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.adam.step()
        self._add_to_mean(index)
        return divergence

    @torch.no_grad()
    def _add_to_mean(self, index: int) -> None:
        count = index + 1 - int(self.updates * FALL_AFTER)
        if count > 0:
            for name, leaf in self.leaves.items():
                self.mean[name] += (leaf - self.mean[name]) / count

    @torch.no_grad()
    def take_mean(self) -> None:
        """Take the mean of the later updates in place of the last one."""
        for name, leaf in self.leaves.items():
            leaf.copy_(self.mean[name])

    def is_judged(self, index: int) -> bool:
        """Whether the judging samples judge after this update."""
        judgements = self.extent.judgements
        return (index + 1) * judgements // self.updates > index * judgements // self.updates

    @torch.no_grad()
    def judge(self) -> Judgement:
        """The divergence of judging samples, and their escapes."""
        samples, targets = zip(*(self.read(index) for index in self.chosen.judging), strict=True)
        states, escapes = self.decoder.last_states(samples)
        pairs = zip(states, targets, strict=True)
        divergences = torch.cat([self.objective.divergences(last[0], target) for last, target in pairs])
        # Samples may have no text at all.
        mean = float(divergences.mean()) if divergences.numel() else 0.0
        return Judgement(mean, {name: found.rate for name, found in escapes.items()})

    @torch.no_grad()
    def keep_escape_rates(self, allowed: Mapping[str, float], found: Mapping[str, float]) -> None:
        """Raise the steps of each input whose rate of escapes `found` is over the one that is `allowed`.

        Codes get smaller by that, so the scales of the linears that read them grow as much. Group scales do not learn.
        """
        changes = self.decoder.changes
        raised = {name: _raise(allowed[name], found[name]) for name in changes.steps}
        for name, step in changes.steps.items():
            step += raised[name]
        for layer, scale in changes.scales.items():
            scale += raised[self.decoder.spec.layers[layer].shared_input]

    def learned(self) -> dict[str, Tensor]:
        """What was learned so far, by the names of Changes.parameters."""
        return {name: leaf.detach().cpu().clone() for name, leaf in self.leaves.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next updates depend on, by name."""
        tensors = {f"change {name}": leaf.detach() for name, leaf in self.leaves.items()}
        tensors |= {f"mean {name}": value for name, value in self.mean.items()}
        for name, leaf in self.leaves.items():
            tensors |= {f"adam {key} {name}": value for key, value in self.adam.state.get(leaf, {}).items()}
        return {name: value.cpu().clone() for name, value in tensors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state[f"change {name}"])
            self.mean[name].copy_(state[f"mean {name}"])
            keys = [key.split(" ")[1] for key in state if key.startswith("adam ") and key.endswith(f" {name}")]
            if keys:
                self.adam.state[leaf] = {
                    key: state[f"adam {key} {name}"].to(leaf.device if key != "step" else "cpu") for key in keys
                }


def _power_of_two(value: float) -> float:
    """The largest power of two that is not above `value`; 1 if it is 0 or not finite."""
    return 2.0 ** (math.frexp(value)[1] - 1) if 0 < value < math.inf else 1.0


def _raise(allowed: float, found: float) -> float:
    """Logarithm of the factor of an input's steps that brings its rate of escapes from `found` to `allowed`."""
    if found <= allowed:
        return 0.0
    # An input that had no escapes gets the largest raise.
    ratio = min(found / allowed, LARGEST_RATIO) if allowed else LARGEST_RATIO
    return math.log(ratio) / ESCAPE_POWER
