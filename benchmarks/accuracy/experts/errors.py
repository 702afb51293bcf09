"""The error of each expert over the tokens that chose it, on the inputs and with the choices of the 16-bit model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.experts.separate import experts_of

# A block's hidden states [M, K], and the experts of each token [M, T].
Routed = tuple[Tensor, Tensor]
# By expert: squared error and square of the 16-bit output, summed over its tokens, and the number of these.
Sums = Tensor


@torch.no_grad()
def expert_errors(model: Any, reference: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, dict[str, list[Any]]]:
    """By list of experts: "tokens" that chose each expert, and its relative "error", None without tokens.

    `batches` are keyword arguments of both models. The error is the norm of the difference over that of the 16-bit
    output, before the router's weights, of all tokens together. Padding does not count.
    """
    own, plain = experts_of(model), experts_of(reference)
    counts = {name: _count(reference, name) for name in plain}
    sums = {name: torch.zeros(counts[name], 3, dtype=torch.float64) for name in plain}
    for batch in batches:
        routed: dict[str, Routed] = {}
        real = batch["attention_mask"].flatten().bool()
        _run(reference, batch, plain, partial(_note, routed))
        _run(model, batch, own, partial(_add, sums, plain, routed, real))
    return {
        name: {
            "tokens": [round(tokens) for tokens in found[:, 2].tolist()],
            "error": [(error / power) ** 0.5 if power else None for error, power, _ in found.tolist()],
        }
        for name, found in sums.items()
    }


def _count(reference: nn.Module, name: str) -> int:
    """How many experts a router chooses among: it stands beside them."""
    weight = reference.get_submodule(name.removesuffix("experts") + "gate").weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _run(
    model: nn.Module,
    batch: dict[str, Tensor],
    experts: dict[str, nn.Module],
    before: Callable[[str, nn.Module, Sequence[Any]], None],
) -> None:
    """Run the model with `before` called before each module of experts, with its name, itself and its arguments."""
    handles = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: before(name, module, arguments))
        for name, module in experts.items()
    ]
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _note(routed: dict[str, Routed], name: str, module: nn.Module, arguments: Sequence[Any]) -> None:
    routed[name] = (arguments[0], arguments[1])


def _add(
    sums: Mapping[str, Sums],
    plain: Mapping[str, nn.Module],
    routed: Mapping[str, Routed],
    real: Tensor,
    name: str,
    module: nn.Module,
    arguments: Sequence[Any],
) -> None:
    """Add one batch: every token goes through each expert, for modules know tokens by their place in the batch."""
    x, chosen = routed[name]
    total = sums[name]
    for expert in range(len(total)):
        seen = (chosen == expert).any(-1) & real
        if bool(seen.any()):
            # Calling forward leaves out the hook that is running.
            index, weight = torch.full_like(chosen[:, :1], expert), seen[:, None].to(x.dtype)
            wanted, found = (each.forward(x, index, weight).double() for each in (plain[name], module))
            total[expert, 0] += (found - wanted).square().sum()
            total[expert, 1] += wanted.square().sum()
            total[expert, 2] += seen.sum()
