"""The steps of learning: Adam, the samples of each step, and the samples that judge the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.learn.model import Escapes, LearningDecoder
from calibration.learn.targets import Objective, Target
from calibration.quantize.held_out import SAMPLES_PER_HELD

# The most that a step changes a logarithm, or a constant in units of its output's size.
RATE = 3e-4
BETAS = (0.9, 0.95)
# Steps over which the rate rises, and the share of all steps after which it falls. The mean of the changes over the
# steps after it is judged in the end: single steps scatter about it.
WARM_UP, FALL_AFTER = 5, 0.5
# The rate of escapes falls about as this power of an input's steps. At once at most the largest ratio is undone.
ESCAPE_POWER, LARGEST_RATIO = 4.0, 1.5
# Samples that do not teach judge this often: those that the fits of weights held out. A single one can be unlike all
# others, so a quarter of all judges.
JUDGEMENTS, SAMPLES_PER_JUDGE = 8, SAMPLES_PER_HELD["best"]
# Samples of more tokens are left out: a pass back through a block holds all values of a sample.
LONGEST = 4096
# About as many tokens are learned from, those of few samples several times; with fewer than the least, nothing is.
TOKENS, LEAST_TOKENS = 2**16, 2**12
# Every sample is learned from at most this often.
ROUNDS = 4
# Tokens of judging samples, about.
JUDGED_TOKENS = 2**13


@dataclass(frozen=True)
class Chosen:
    """Indices of the samples that are learned from, and of those that judge."""

    learned: list[int]
    judging: list[int]
    # How often each sample is learned from.
    rounds: int = 1


def choose_samples(lengths: Sequence[int]) -> Chosen | None:
    """The samples of learning, by the number of tokens of each: the last of every SAMPLES_PER_JUDGE judges.

    None if no sample judges, or if all others have fewer than LEAST_TOKENS tokens.
    """
    fitting = [index for index, length in enumerate(lengths) if length <= LONGEST]
    judging = [index for index in fitting if index % SAMPLES_PER_JUDGE == SAMPLES_PER_JUDGE - 1]
    learned = [index for index in fitting if index not in judging]
    if not judging or sum(lengths[index] for index in learned) < LEAST_TOKENS:
        return None
    rounds = rounds_of(sum(lengths[index] for index in learned))
    return Chosen(_thinned(learned, lengths, TOKENS), _thinned(judging, lengths, JUDGED_TOKENS), rounds)


def rounds_of(tokens: int) -> int:
    """How often each of the samples that have `tokens` tokens together is learned from."""
    return max(1, min(ROUNDS, TOKENS // tokens))


def _thinned(samples: Sequence[int], lengths: Sequence[int], tokens: int) -> list[int]:
    """Evenly spaced ones of the samples, of about `tokens` tokens together; at least one."""
    total = sum(lengths[index] for index in samples)
    count = max(1, min(len(samples), len(samples) * tokens // total))
    return [samples[place * len(samples) // count] for place in range(count)]


def rate_factor(step: int, steps: int) -> float:
    """The factor of the rate at a step: it rises at first, and falls to nearly nothing in the end."""
    rise = min(1.0, (step + 1) / WARM_UP)
    return rise * min(1.0, (steps - step) / (steps * (1 - FALL_AFTER)))


@dataclass(frozen=True)
class Judgement:
    """What judging samples say: the mean divergence of their tokens, and the rate of escapes by input."""

    divergence: float
    rates: dict[str, float]


class Descent:
    """Lowers the divergence of a decoder from the 16-bit model, one sample a step."""

    def __init__(
        self,
        decoder: LearningDecoder,
        objective: Objective,
        chosen: Chosen,
        read: Callable[[int], tuple[MemoryInput, Target]],
        seed: int,
    ) -> None:
        """`read` gives a sample by its index, and its target; `seed` decides the order of samples."""
        self.decoder, self.objective, self.chosen, self.read = decoder, objective, chosen, read
        generator, count = torch.Generator().manual_seed(seed), len(chosen.learned)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(chosen.rounds)])
        self.order = [chosen.learned[place] for place in order.tolist()]
        self.leaves = decoder.changes.parameters()
        self.adam = torch.optim.Adam(list(self.leaves.values()), lr=RATE, betas=BETAS)
        # Of the leaves, over the steps after FALL_AFTER of all.
        self.mean = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in self.leaves.items()}

    @property
    def steps(self) -> int:
        """The number of all steps."""
        return len(self.order)

    def step(self, index: int) -> float:
        """Learn from one sample; its mean divergence before the step."""
        sample, target = self.read(self.order[index])
        states = self.decoder.states(sample)
        divergence, by_last = self.objective.derivatives(states[-1][0], target)
        self.adam.zero_grad()
        self.decoder.back(sample, states, by_last[None])
        for group in self.adam.param_groups:
            group["lr"] = RATE * rate_factor(index, self.steps)
        self.adam.step()
        self._add_to_mean(index)
        return divergence

    @torch.no_grad()
    def _add_to_mean(self, index: int) -> None:
        count = index + 1 - int(self.steps * FALL_AFTER)
        if count > 0:
            for name, leaf in self.leaves.items():
                self.mean[name] += (leaf - self.mean[name]) / count

    @torch.no_grad()
    def take_mean(self) -> None:
        """Take the mean of the later steps in place of the last one."""
        for name, leaf in self.leaves.items():
            leaf.copy_(self.mean[name])

    def is_judged(self, index: int) -> bool:
        """Whether the judging samples judge after this step."""
        return (index + 1) * JUDGEMENTS // self.steps > index * JUDGEMENTS // self.steps

    @torch.no_grad()
    def judge(self) -> Judgement:
        """The divergence of judging samples, and their escapes."""
        found, escapes = [], dict[str, Escapes]()
        for index in self.chosen.judging:
            sample, target = self.read(index)
            last = self.decoder.states(sample, escapes)[-1][0]
            found.append(self.objective.divergences(last, target))
        # Samples may have no text at all.
        divergences = torch.cat(found)
        mean = float(divergences.mean()) if divergences.numel() else 0.0
        return Judgement(mean, {name: found.rate for name, found in escapes.items()})

    @torch.no_grad()
    def keep_rates(self, allowed: Mapping[str, float], found: Mapping[str, float]) -> None:
        """Raise the steps of each input whose rate of escapes `found` is over the one that is `allowed`."""
        for name, step in self.decoder.changes.steps.items():
            if found[name] > allowed[name]:
                # An input that had no escapes gets the largest raise.
                ratio = min(found[name] / allowed[name], LARGEST_RATIO) if allowed[name] else LARGEST_RATIO
                step += math.log(ratio) / ESCAPE_POWER

    def learned(self) -> dict[str, Tensor]:
        """What was learned so far, by the names of Changes.parameters."""
        return {name: leaf.detach().cpu().clone() for name, leaf in self.leaves.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, by name."""
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
