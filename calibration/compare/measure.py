"""Divergence, perplexity and block outputs of two models, sample by sample. Both models are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calibration.data.rendering import Sample
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS

TEXT = DEFAULT_ROWS.index("text")
# Positions whose logits are turned into float32 probabilities at once: a vocabulary has 150,000 entries.
CHUNK = 128
# Its exponential is near the largest float.
_MOST_LOSS = 700.0


@dataclass
class Group:
    """Sums over the text tokens that are predicted in the samples of one modality."""

    samples: int = 0
    tokens: int = 0
    first_loss: float = 0.0
    second_loss: float = 0.0
    divergence: float = 0.0
    # Tokens for which both models' likeliest token is the same.
    agreeing: int = 0

    def add(self, other: Group) -> None:
        """Add the sums of another group."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float]:
        """Perplexities of both models, mean divergence in nats, and the share of tokens on which they agree."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "first_perplexity": math.exp(min(self.first_loss / self.tokens, _MOST_LOSS)),
            "second_perplexity": math.exp(min(self.second_loss / self.tokens, _MOST_LOSS)),
            "divergence": self.divergence / self.tokens,
            "agreement": self.agreeing / self.tokens,
        }


@dataclass
class Comparison:
    """The sums of a comparison."""

    # By modality: "text" are samples without media, the others those that hold the medium; "all" are all samples.
    groups: dict[str, Group] = field(default_factory=dict)
    # Squared error of each decoder block's output, and the squared output of the first model.
    block_errors: list[float] = field(default_factory=list)
    block_squares: list[float] = field(default_factory=list)

    def relative_errors(self) -> list[float]:
        """Root mean square error of each block's output, relative to the first model's output."""
        pairs = zip(self.block_errors, self.block_squares, strict=True)
        return [math.sqrt(error / square) if square else math.nan for error, square in pairs]


def compare(
    first: nn.Module,
    second: nn.Module,
    block_module: str,
    samples: Sequence[Sample],
    on_sample: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Run both models on the samples; `block_module` names their list of decoder blocks.

    `on_sample` is called with the number of finished samples. Raises MorphoQuantError if a model's logits are NaN or
    infinite: no figure would say so.
    """
    result = Comparison()
    for done, sample in enumerate(samples, 1):
        (expected, blocks), (found, others) = (_run(model, block_module, sample) for model in (first, second))
        for which, logits in (("first", expected), ("second", found)):
            if not bool(logits.isfinite().all()):
                raise MorphoQuantError(
                    f"{sample.source}: the {which} model answers with NaN or infinite logits; take its files again, or "
                    "--dtype float32"
                )
        _add_blocks(result, blocks, others)
        group = _predictions(expected, found, sample)
        if group.tokens:
            for name in ("all", *modalities(sample)):
                result.groups.setdefault(name, Group()).add(group)
        on_sample(done)
    return result


def modalities(sample: Sample) -> list[str]:
    """The media of a sample; "text" if it has none."""
    rows = {DEFAULT_ROWS[row] for row in sample.modality.tolist()} - {"text"}
    return [row for row in DEFAULT_ROWS if row in rows] or ["text"]


@torch.no_grad()
def _run(model: nn.Module, block_module: str, sample: Sample) -> tuple[Tensor, list[Tensor]]:
    """Logits [M, vocabulary] and the output [M, hidden] of each block."""
    outputs: list[Tensor] = []
    dtype = next(model.parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.inputs.items()}
    with _watching(model.get_submodule(block_module), outputs):
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits, outputs


@contextmanager
def _watching(blocks: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Append the output of each block while the model runs."""

    def keep(module: nn.Module, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(-1, _hidden(output)))

    hooks = [block.register_forward_hook(keep) for block in blocks.children()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Tensor | tuple[Tensor, ...]) -> int:
    return (output[0] if isinstance(output, tuple) else output).shape[-1]


def _add_blocks(result: Comparison, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    if not result.block_errors:
        result.block_errors, result.block_squares = [0.0] * len(expected), [0.0] * len(expected)
    for index, (want, have) in enumerate(zip(expected, found, strict=True)):
        result.block_errors[index] += float((have.double() - want.double()).square().sum())
        result.block_squares[index] += float(want.double().square().sum())


def _predictions(expected: Tensor, found: Tensor, sample: Sample) -> Group:
    """The sums of one sample over the text tokens that follow another token."""
    ids = sample.inputs["input_ids"][0]
    places = (sample.modality[1:] == TEXT).nonzero().flatten()
    group = Group(samples=1, tokens=places.numel())
    for chunk in places.split(CHUNK):
        want, have = (logits[chunk].double().log_softmax(-1) for logits in (expected, found))
        targets = ids[chunk + 1][:, None]
        group.first_loss -= float(want.gather(1, targets).sum())
        group.second_loss -= float(have.gather(1, targets).sum())
        group.divergence += float((want.exp() * (want - have)).sum())
        group.agreeing += int((want.argmax(-1) == have.argmax(-1)).sum())
    return group
