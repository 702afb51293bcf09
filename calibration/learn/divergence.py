"""How far the next token's probabilities are from those of the 16-bit model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibration.blocks.memory_need import LOGITS_TOKENS


class Divergence(torch.autograd.Function):
    """KL divergence float32 [M] of each token's successor, by the states before the head and its weights.

    `states` and `wanted` [M, hidden] are those of the model and of the 16-bit model. Only `states` has a gradient. The
    head's weights are [vocabulary, hidden].
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, head: Tensor) -> Tensor:
        found, gradients = [], []
        for own, other in zip(states.split(LOGITS_TOKENS), wanted.split(LOGITS_TOKENS), strict=True):
            own_log, other_log = ((part @ head.T).log_softmax(-1) for part in (own, other))
            probability = other_log.exp()
            found.append((probability * (other_log - own_log)).sum(-1))
            gradients.append(own_log.exp_().sub_(probability) @ head)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][:, None] * ctx.saved_tensors[0], None, None


@torch.no_grad()
def drawn_derivatives(states: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """Derivatives float32 [M, hidden] of a drawn successor's negative log probability, by the states before the head.

    states [M, hidden], head [vocabulary, hidden]; the successors are drawn from the model's own probabilities. The mean
    of a derivative times itself is then the second derivative of the divergence. Those of states that are not finite
    are 0.
    """
    found = [states.new_empty(0, states.shape[1])]
    for own in states.split(LOGITS_TOKENS):
        probability = (own @ head.T).softmax(-1)
        broken = ~probability.isfinite().all(-1)
        probability[broken] = 1 / head.shape[0]
        drawn = torch.multinomial(probability, 1, generator=generator)
        by_logits = probability.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=probability.dtype))
        by_logits[broken] = 0
        found.append(by_logits @ head)
    return torch.cat(found)
