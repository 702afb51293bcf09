"""Metrics of outputs: derivatives of drawn successors, of the tokens that count."""

import pytest
import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.learn.divergence import LOGITS_TOKENS, Divergence, drawn_derivatives
from calibration.learn.metrics import _DrawnSuccessors

TEXT, IMAGE = 0, 1


def test_squared_they_are_the_second_derivative_of_the_divergence() -> None:
    """For many draws at one state; more than are in memory at once."""
    generator = torch.Generator().manual_seed(1)
    head, state = torch.randn(11, 5, generator=generator), torch.randn(1, 5, generator=generator)
    count = 200 * LOGITS_TOKENS + 1
    drawn = drawn_derivatives(state.expand(count, 5), head, generator)
    step = 0.02 * torch.randn(1, 5, generator=generator)
    divergence = float(Divergence.apply(state + step, state, head))
    # 3 % are over three standard errors of this mean.
    assert float((drawn @ step.T).square().mean()) / 2 == pytest.approx(divergence, rel=0.03)
    # A drawn successor tells the model nothing new.
    assert float((drawn @ step.T).mean().abs()) < 4 * float((drawn @ step.T).std()) / count**0.5


def test_states_that_are_not_finite_have_none() -> None:
    states = torch.ones(3, 4)
    states[1] = float("inf")
    found = drawn_derivatives(states, torch.eye(4), torch.Generator().manual_seed(1))
    assert bool(found.isfinite().all()) and not bool(found[1].any()) and bool(found[2].any())
    assert drawn_derivatives(states[:0], torch.eye(4), torch.Generator()).shape == (0, 4)


class Doubling:
    """Stands for the head of a model whose norm doubles its states."""

    weight = torch.eye(4)

    def normed(self, last: Tensor) -> Tensor:
        return 2 * last


def test_tokens_before_media_and_massive_ones_have_none() -> None:
    modality = torch.tensor([TEXT, TEXT, IMAGE, TEXT, TEXT, TEXT], dtype=torch.int32)
    last = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(6)
    sample = MemoryInput(modality=modality, positions=positions, hidden=last, arguments=[])
    massive = torch.tensor([True, False, False, False, False, False])
    derivative = _DrawnSuccessors(Doubling(), TEXT, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    found = derivative(sample, massive, last)
    assert found.shape == last.shape
    # The first token is massive, the second comes before a picture, and the last has no successor.
    assert (found[0] != 0).any(1).tolist() == [False, False, True, True, True, False]
    # Through the norm: twice the derivative by the states before the head, of which one is -1 + p and the others p.
    assert torch.allclose(found.sum(-1), torch.zeros(1, 6), atol=1e-6)
    assert float(found.abs().max()) <= 2
