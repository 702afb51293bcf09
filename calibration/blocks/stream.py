"""Which linear adds its output to the hidden states that leave a block: it can correct them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# The linear's output is changed by this many times itself. A large change stands out from the rounding of 16-bit sums.
CHANGE = 16.0
# Largest deviation of the block's change from a multiple of the linear's, relative to it, in the median of tokens.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Added:
    """How a block adds the output of its last linear to its own."""

    # The linear, by its name in the block.
    shard: str
    factor: float
    # N of the linear.
    outputs: int


def added_factor(run: Callable[[], Tensor], linear: nn.Module) -> float | None:
    """The factor with which a block adds the output of `linear` to its own; None if it does more with it.

    `run` runs the block on one sample and returns its output [..., N]. A norm of the linear's output, a gate, or a
    product after it makes a difference between tokens. Tokens count by their median, since a large change may overflow
    in a few.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    def change(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * (1 + CHANGE)

    before, after = (_hooked(run, linear, hook).float().flatten(0, -2) for hook in (keep, change))
    added = outputs[0].to(before).flatten(0, -2)
    if added.shape != before.shape:
        return None
    changed = (after - before) / CHANGE
    factor = float(((changed * added).sum(1) / added.square().sum(1)).nanmedian())
    deviation = float(((changed - factor * added).norm(dim=1) / (factor * added).norm(dim=1)).nanmedian())
    return factor if factor > 0 and deviation < TOLERANCE else None


def _hooked(run: Callable[[], Tensor], linear: nn.Module, hook: Callable[..., Tensor | None]) -> Tensor:
    handle = linear.register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


def drawn_states(states: Tensor, positions: Tensor) -> Tensor:
    """The states [..., M, hidden] of one sample at the drawn `positions`, float32 [tokens, hidden]."""
    return states.flatten(0, -2)[positions].float()
