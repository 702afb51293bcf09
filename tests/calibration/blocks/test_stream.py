"""Which linear a block adds to its output."""

import pytest
import torch
from torch import Tensor, nn

from calibration.blocks.stream import added_factor, drawn_states

HIDDEN, INNER, TOKENS = 16, 24, 10


class Block(nn.Module):
    """x + after(down(act(up(x)))), where `after` is what a kind of model does."""

    def __init__(self, after: nn.Module | None = None, factor: float = 1.0, *, gated: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        self.after, self.factor = after or nn.Identity(), factor
        self.gate = nn.Linear(HIDDEN, 1) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.after(self.down(self.up(x).relu()))
        if self.gate is not None:
            inner = inner * self.gate(x).sigmoid()
        return x + self.factor * inner


def factor_of(block: Block, x: Tensor, linear: str = "down") -> float | None:
    block = block.to(x.dtype)
    with torch.no_grad():
        return added_factor(lambda: block(x), block.get_submodule(linear))


def states() -> Tensor:
    torch.manual_seed(0)
    return 10 * torch.randn(1, TOKENS, HIDDEN)


@pytest.mark.parametrize("factor", [1.0, 0.22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_linear_that_is_added_has_its_factor(factor: float, dtype: torch.dtype) -> None:
    x = states().to(dtype)
    # 16-bit sums of states ten times as large as the linear's outputs.
    assert factor_of(Block(factor=factor), x) == pytest.approx(factor, rel=1e-5 if dtype == torch.float32 else 0.02)


def test_a_massive_token_does_not_decide() -> None:
    x = states().half()
    x[0, 0] *= 3000
    assert factor_of(Block(), x) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    "block",
    [Block(nn.RMSNorm(HIDDEN)), Block(nn.LayerNorm(HIDDEN)), Block(nn.Tanh()), Block(gated=True)],
    ids=["a norm after it", "a norm with a mean", "a function after it", "a gate of each token"],
)
def test_a_linear_with_more_after_it_has_none(block: Block) -> None:
    assert factor_of(block, states()) is None


def test_a_linear_within_the_block_has_none() -> None:
    assert factor_of(Block(), states(), "up") is None
    square = Block()
    square.up, square.down = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    assert factor_of(square, states(), "up") is None


def test_a_linear_whose_output_is_zero_has_none() -> None:
    block = Block()
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    assert factor_of(block, states()) is None


def test_the_hooks_are_gone_afterwards() -> None:
    block, x = Block(), states()
    with torch.no_grad():
        before = block(x)
        factor_of(block, x)
        assert torch.equal(block(x), before)


def test_drawn_states_are_those_of_the_positions() -> None:
    found = drawn_states(states().half(), torch.tensor([7, 2]))
    assert torch.equal(found, states().half()[0, [7, 2]].float())
