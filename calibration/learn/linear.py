"""A quantized linear that learns: rounding passes the gradient, and so its step, output scale and constant learn.

Codes of weights, escape masks, centres and gains are fixed. All changes are zero at first: the linear then computes
what the checkpoint's tensors compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.blocks.served_linear import TokenRows
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, scale_scheme_of
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record, code_limits, escapes, token_rows
from morphoquant_vllm.numerics.linear import weight_record


class RoundInput(torch.autograd.Function):
    """Codes float32 [M, K], in channel order, of x float32 [M, K] of tokens in `rows` [M].

    `change` [K] is the logarithm of the factor of each step, in natural order as x. The gradient passes the rounding,
    but not the clamping.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, record: ActivationRecord, rows: Tensor) -> Tensor:
        order, places = record.channel_order.long(), _places(rows)
        x, factor = x.index_select(1, order), torch.exp(-change[order])
        exact, codes = torch.empty_like(x), torch.empty_like(x)
        inside = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for row, place in places.items():
            low, high = code_limits(record.mask[row])
            values = (x[place] - record.centre[row]).mul_(record.inverse[row] * factor)
            exact[place] = values
            inside[place] = (values >= low - 0.5) & (values <= high + 0.5)
            codes[place] = torch.minimum(torch.maximum(values.round_(), low), high)
        ctx.save_for_backward(exact, inside, record.inverse * factor)
        ctx.places, ctx.natural = places, order.argsort()
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exact, inside, inverse = ctx.saved_tensors
        of_exact = gradients[0] * inside
        of_change = -(of_exact * exact).sum(0)
        for row, place in ctx.places.items():
            of_exact[place] *= inverse[row]
        # Gathered: autograd itself would scatter, which takes longer than the product on a CPU.
        return of_exact.index_select(1, ctx.natural), of_change[ctx.natural], None, None


def _places(rows: Tensor) -> dict[int, Tensor | slice]:
    """The tokens of each row that occurs."""
    found: list[int] = rows.unique().tolist()
    if len(found) == 1:
        return {found[0]: slice(None)}
    return {row: (rows == row).nonzero().flatten() for row in found}


@dataclass(frozen=True)
class LinearChanges:
    """What one linear learns: of its outputs, and of the input that it may share."""

    # Logarithm of the factor of each step, in natural channel order [K].
    step: Tensor
    # Logarithm of the factor of each output's scale [N]; None if its scales are not learned.
    scale: Tensor | None
    # Added to the constant of every row but the massive one, in units of `size` [N].
    constant: Tensor
    # Size of the outputs in the 16-bit model.
    size: float


class LearningInput:
    """The quantizer of one input. Linears that share the input share its codes."""

    def __init__(self, tensors: Mapping[str, Tensor], step: Tensor, serving: TokenRows, device: torch.device) -> None:
        self.record = activation_record(*(tensors[name].to(device) for name in INPUT_TENSORS))
        self.step, self.serving = step, serving
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes float32 [M, K] in channel order, and the row of each token, int32 [M]; x [..., K]."""
        if self._last is None or self._last[0] is not x:
            flat = x.reshape(-1, x.shape[-1]).float()
            rows = token_rows(flat.detach(), self.serving.modality_of(flat), self.record)
            codes: Tensor = RoundInput.apply(flat, self.step, self.record, rows)
            self._last = x, codes, rows
        return self._last[1:]

    def escapes(self) -> tuple[int, int]:
        """Of the last codes of tokens that are not massive: those outside 4 bits, and all."""
        assert self._last is not None
        _, codes, rows = self._last
        ordinary = codes.detach()[rows < self.record.gain.numel() - 1]
        return int(escapes(ordinary).sum()), ordinary.numel()

    def forget(self) -> None:
        """Free the last codes, with the graph of their gradient."""
        self._last = None


class LearningLinear(nn.Module):
    """A linear of a checkpoint's tensors that learns `changes`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], bias: Tensor | None, given: LearningInput, changes: LinearChanges
    ) -> None:
        super().__init__()
        device = given.record.inverse.device
        weight = weight_record(*(tensors[name].to(device) for name in OUTPUT_TENSORS[scale_scheme_of(tensors)]))
        self.given, self.changes = given, changes
        # Fixed, as the bias is.
        self.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
        self.constant = weight.absorbed_bias if bias is None else weight.absorbed_bias + bias.float()
        # The last row is that of massive tokens.
        self.learns = torch.ones(len(self.constant), 1, device=device)
        self.learns[-1] = 0

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], in its dtype."""
        codes, rows = self.given.codes(x)
        places = rows.long()
        y = (codes @ self.weight.T) * self.given.record.gain[places, None]
        if self.changes.scale is not None:
            y = y * self.changes.scale.exp()
        learned = self.learns[places] * (self.changes.constant * self.changes.size)
        y = y + (self.constant[places] + learned)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
