"""What 4-bit and 8-bit weights, and 4-bit activations, cost the model's output, estimated for one input. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.quantize import step_search
from calibration.quantize.chunks import zip_chunks
from calibration.quantize.served_weights import channel_importance
from morphoquant_vllm.numerics import activation, weights


@dataclass(frozen=True)
class Probe:
    """Some tokens of one input, and how much errors of its linears' outputs matter."""

    # The input in the 16-bit model, float32 [tokens, K]: ordinary tokens, not massive ones.
    x: Tensor
    # Derivatives of a random projection of the model's output by the outputs of all linears: float32 [tokens, N].
    gradient: Tensor
    # The 16-bit weights of all linears, float32 [N, K].
    matrix: Tensor


def losses(probe: Probe, group_size: int, escape_budget: float) -> dict[int, float]:
    """Error of the model's output by form (4, 8 or 16 bits) of the input's linears, summed over the tokens.

    Each weight is rounded by itself, and all tokens share one row. So the result compares inputs; it does not forecast
    errors. The errors of weights and of activations count as independent.
    """
    x, matrix = probe.x, probe.matrix
    if not x.shape[0]:
        return dict.fromkeys((4, 8, 16), 0.0)
    codes, step, values = _coded(x, matrix, escape_budget)
    of_activations = _cost(probe, values - x, matrix)
    absorbed = weights.absorb(matrix, step)
    order = weights.channel_order(absorbed).long()
    absorbed, codes = absorbed[:, order], codes[:, order]
    rounded = weights.quantize_int4(absorbed, channel_importance(codes.square().mean(0)), group_size)
    of_four = _cost(probe, codes, _error(rounded, absorbed))
    of_eight = _cost(probe, codes, _error(weights.quantize_int8(absorbed, group_size), absorbed))
    return {4: of_four + of_activations, 8: of_eight + of_activations, 16: 0.0}


def _coded(x: Tensor, matrix: Tensor, escape_budget: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes float32 [tokens, K] of x, the step of each channel [K], and the values that the codes stand for."""
    weight = torch.full(x.shape[:1], 1 / x.shape[0], device=x.device)
    centre = step_search.centres(x)
    parts = zip_chunks(x, weight, weight[:, None])
    grid = step_search.budget_grid(parts, centre, x.amin(0), x.amax(0), matrix.square().sum(0), escape_budget)
    low, high = activation.code_limits(torch.tensor(escape_budget > 0))
    codes = ((x - centre) / grid.step).round_().clamp_(float(low), float(high))
    return codes, grid.step, codes * grid.step + centre


def _error(rounded: tuple[Tensor, Tensor], absorbed: Tensor) -> Tensor:
    """Errors of weights codes int8 [N, K] and their scales, float32 [N, K]."""
    codes, scale = rounded
    served = codes.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]
    return served.flatten(1) - absorbed


def _cost(probe: Probe, values: Tensor, matrix: Tensor) -> float:
    """The expected square of the output's change by errors values @ matrix.T, float32 [tokens, N], of the linears."""
    total = 0.0
    for own, gradient in zip_chunks(values, probe.gradient):
        total += float(((own @ matrix.T) * gradient).sum(1).double().square().sum())
    return total
