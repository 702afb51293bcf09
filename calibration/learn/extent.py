"""How much each effort learns, and the samples that it learns from and judges by. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibration.quantize.held_out import is_held_sample

# Samples of more tokens are left out: a pass back through a block holds all values of a sample.
LONGEST = 4096
# With fewer tokens in the samples that teach, nothing is learned.
LEAST_TOKENS = 2**12


@dataclass(frozen=True)
class Extent:
    """How much an effort learns."""

    # About as many tokens are learned from, those of few samples several times.
    tokens: int
    # Every sample is learned from at most this often.
    most_passes: int
    # Samples that do not teach judge this often: those that the fits of weights held out.
    judgements: int
    # Tokens of judging samples, about.
    judged_tokens: int
    # The most that an update changes a logarithm, or a constant in units of its output's size. One sample's gradient is
    # noisy: with a large rate, few updates cannot undo the noise of the first ones.
    learning_rate: float

    def passes_of(self, tokens: int) -> float:
        """How often the samples that have `tokens` tokens together are learned from; some of them once more."""
        return max(1.0, min(self.most_passes, self.tokens / tokens))


# By the recipe's effort. Effort `fast` learns nothing.
EXTENTS = {"default": Extent(2**16, 4, 8, 2**12, 1.5e-4), "best": Extent(3 * 2**16, 12, 24, 2**13, 1.5e-4)}


@dataclass(frozen=True)
class Chosen:
    """Indices of the samples that are learned from, and of those that judge; and how many updates there are.

    A sample is learned from again when all others were.
    """

    learned: list[int]
    judging: list[int]
    updates: int


def choose_samples(lengths: Sequence[int], effort: str) -> Chosen | None:
    """The samples of learning, by the number of tokens of each: those that `is_held_sample` names judge.

    None if no sample judges, or if all others have fewer than LEAST_TOKENS tokens.
    """
    extent = EXTENTS[effort]
    fitting = [index for index, length in enumerate(lengths) if length <= LONGEST]
    judging = [index for index in fitting if is_held_sample(index)]
    learned = [index for index in fitting if not is_held_sample(index)]
    tokens = sum(lengths[index] for index in learned)
    if not judging or tokens < LEAST_TOKENS:
        return None
    taught = _thinned(learned, lengths, extent.tokens)
    updates = round(len(taught) * extent.passes_of(tokens))
    return Chosen(taught, _thinned(judging, lengths, extent.judged_tokens), updates)


def _thinned(samples: Sequence[int], lengths: Sequence[int], tokens: int) -> list[int]:
    """Evenly spaced ones of the samples, of about `tokens` tokens together; at least one."""
    total = sum(lengths[index] for index in samples)
    count = max(1, min(len(samples), len(samples) * tokens // total))
    return [samples[place * len(samples) // count] for place in range(count)]
