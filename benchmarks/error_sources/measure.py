"""Errors of the linears of one input on held-out tokens, by their source, and for strengths of the regression's pull.

Every error is the sum of squares of the error of the outputs over that of the 16-bit outputs. Tokens that take the
massive row do not count: a separate row serves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.error_sources.inputs import PairedInput
from calibration.quantize.moments import Moments, fitting_shrinkage, gather, output_bias, regress
from morphoquant_vllm.numerics.activation import act_quant, dequantize, token_rows
from morphoquant_vllm.numerics.weights import absorb

# The name of the text on which weights are fitted.
CALIBRATION = "calibration"


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one input in channel order: codes int8 [T, K], values less the centre [T, K], gain and set [T]."""

    codes: Tensor
    values: Tensor
    gain: Tensor
    token_set: Tensor


@torch.no_grad()
def measure(inputs: PairedInput, pulls: Sequence[float], strengths: Sequence[float]) -> dict[str, Any]:
    """The figures of one input: `before`, `own`, `served`, and of fits with fixed pulls and with strengths.

    before: the input's errors by earlier layers, through 16-bit weights. own: the rounding of the 16-bit input. served:
    all of it, as the checkpoint computes it. A fit has unrounded weights; `plain` is that of W times the step.
    """
    record = inputs.served[0].activation()
    matrix = torch.cat([weight.float() for weight in inputs.weights])
    order = record.channel_order.long()
    texts = [text for text in inputs.exact if text != CALIBRATION]
    exact, seen = (torch.cat([values[text] for text in texts]) for values in (inputs.exact, inputs.quantized))
    wanted = exact @ matrix.T
    rows = token_rows(seen, inputs.served[0].modality_of(seen), record)
    ordinary = rows < record.gain.numel() - 1
    power = _power(wanted[ordinary])

    def error(outputs: Tensor) -> float:
        return _power((outputs - wanted)[ordinary]) / power

    decoded = torch.empty_like(exact)
    own_rows = token_rows(exact, inputs.served[0].modality_of(exact), record)
    decoded[:, order] = dequantize(act_quant(exact, own_rows, record), own_rows, record)
    rounding = (decoded - exact) @ matrix.T
    own_ordinary = own_rows < record.gain.numel() - 1
    rounding -= rounding[own_ordinary].mean(0)
    fitted = _Fits(inputs, matrix, _Tokens(*_coded(inputs, CALIBRATION)))
    held = _join([_Tokens(*_coded(inputs, text)) for text in texts])
    # `_coded` leaves the centre out of the values, and so out of the outputs.
    centre = wanted - held.values @ matrix[:, order].T

    def fit(pull: float | None) -> float:
        return error(fitted.outputs(held, pull) + centre)

    channels, tokens = matrix.shape[1], fitted.tokens
    return {
        "input": inputs.name,
        "in_features": channels,
        "tokens": tokens,
        "before": error(seen @ matrix.T),
        "own": _power(rounding[own_ordinary]) / power,
        "served": error(torch.cat([linear(seen).float() for linear in inputs.served], 1)),
        "plain": fit(None),
        "pulls": {str(pull): fit(pull) for pull in pulls},
        "strengths": {str(strength): fit(fitting_shrinkage(strength, channels, tokens)) for strength in strengths},
    }


class _Fits:
    """The regression of one input on its calibration tokens, for any pull."""

    def __init__(self, inputs: PairedInput, matrix: Tensor, tokens: _Tokens) -> None:
        record = inputs.served[0].activation()
        order = record.channel_order.long()
        self.matrix = matrix[:, order]
        step = inputs.served[0].get_buffer("activation_step").float()[order]
        self.absorbed = absorb(self.matrix, step)
        weight = torch.full(tokens.gain.shape, 1 / tokens.gain.numel())
        parts = [(tokens.codes, tokens.gain, tokens.values, tokens.token_set, weight)]
        moments = gather(parts, tokens.codes, weight * tokens.gain.square(), Moments.zeros(2, self.matrix))
        self.tokens, self.means = moments.tokens, moments.means()
        self.code_code, self.code_output = moments.take_centred()

    def outputs(self, tokens: _Tokens, pull: float | None) -> Tensor:
        """Outputs [T, N] without the centre's, by the weights of this pull; None: W times the step."""
        served = self.absorbed
        if pull is not None:
            served = regress(self.code_code, self.code_output.clone(), self.absorbed, pull)
        bias = output_bias(*self.means, self.matrix, served, 1)[0]
        return (tokens.codes.float() * tokens.gain[:, None]) @ served.T + bias[tokens.token_set]


def _coded(inputs: PairedInput, text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of _Tokens: codes of the served input, values of the 16-bit one."""
    record, seen = inputs.served[0].activation(), inputs.quantized[text]
    rows = token_rows(seen, inputs.served[0].modality_of(seen), record)
    values = inputs.exact[text][:, record.channel_order.long()] - record.centre[rows.long()]
    token_set = (rows == record.gain.numel() - 1).long()
    return act_quant(seen, rows, record), values, record.gain[rows.long()], token_set


def _join(parts: Iterable[_Tokens]) -> _Tokens:
    fields = zip(*((part.codes, part.values, part.gain, part.token_set) for part in parts), strict=True)
    return _Tokens(*(torch.cat(field) for field in fields))


def _power(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
