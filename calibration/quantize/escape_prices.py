"""One price per escape for the whole model, by what escapes save in the model's output. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.quantize import step_search
from calibration.quantize.bit_losses import Probe
from calibration.quantize.chunks import zip_chunks

# The price is sought among these, as powers of two times the largest useful one.
PRICES = 161
HALVINGS = 40.0
# An input gets at least and at most this many times the budget: the estimate is one of errors in the 16-bit model.
LEAST, MOST = 0.25, 4.0
LARGEST_BUDGET = 0.2


@dataclass(frozen=True)
class EscapeCosts:
    """The choices of one input: what each candidate step of each channel costs, [CANDIDATES, K], on the CPU."""

    # Error of the model's output, a sum over the tokens, and share of codes that escape.
    error: Tensor
    escape: Tensor

    def rate(self, price: float) -> float:
        """Escape rate of the input if an escape costs `price`."""
        chosen = (self.error + price * self.escape).argmin(0)
        return float(self.escape.gather(0, chosen[None]).mean())

    @property
    def channels(self) -> int:
        return self.error.shape[1]


def escape_costs(probe: Probe) -> EscapeCosts:
    """The costs of an input's candidate steps, weighed by how much each channel matters for the model's output."""
    x, matrix = probe.x, probe.matrix
    weight = torch.full(x.shape[:1], 1 / max(1, x.shape[0]), device=x.device)
    centre = step_search.centres(x)
    tried = step_search.candidate_steps((x - centre).abs().amax(0))
    importance = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for part in probe.gradient.split(256):
        # The derivative of the output by each channel, squared and added up over the tokens.
        importance += (part @ matrix).double().square().sum(0)
    parts = zip_chunks(x, weight, weight[:, None])
    found = step_search.losses(parts, centre, tried, importance.float(), escapes=True)
    return EscapeCosts(found.error.cpu(), found.escape[0].cpu())


def share_budget(costs: Mapping[str, EscapeCosts], budget: float) -> dict[str, float]:
    """The escape budget of each input: at one price for all, their mean over channels is at most `budget`.

    No input gets less than LEAST or more than MOST times `budget`. Empty if the costs compare nothing: none is above 0,
    or some are not finite.
    """
    if not all(bool(cost.error.isfinite().all()) for cost in costs.values()):
        return {}
    if not any(bool(cost.error.any()) for cost in costs.values()):
        return {}
    channels = {name: cost.channels for name, cost in costs.items()}
    total = sum(channels.values())

    def budgets(price: float) -> dict[str, float]:
        most = min(MOST * budget, LARGEST_BUDGET)
        return {name: min(max(cost.rate(price), LEAST * budget), most) for name, cost in costs.items()}

    def mean(found: Mapping[str, float]) -> float:
        return sum(found[name] * channels[name] for name in found) / total

    top = max(float(cost.error.max()) for cost in costs.values()) * 2**8
    low, high = 0, PRICES - 1
    # Prices fall with the index: 0 gives every input the least, and the last lets most escape. The last index within
    # the budget is wanted.
    while low < high:
        middle = (low + high + 1) // 2
        within = mean(budgets(top * 2 ** (-HALVINGS * middle / (PRICES - 1)))) <= budget
        low, high = (middle, high) if within else (low, middle - 1)
    return budgets(top * 2 ** (-HALVINGS * low / (PRICES - 1)))
