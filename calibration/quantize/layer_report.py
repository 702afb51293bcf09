"""What the report says about each quantized linear. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.data.token_choice import TokenSample
from calibration.processes import ONE, Processes
from calibration.quantize.chunks import chunks
from calibration.quantize.modality_rows import RowChoice
from morphoquant_vllm.numerics import activation

# The output error is measured on about this many tokens.
ERROR_TOKENS = 2048
# So many tokens are multiplied at once: enough that weights are seldom read.
RUN_TOKENS = 256


@dataclass(frozen=True)
class LayerRecord:
    """What the report says about one quantized linear."""

    # Codes outside [-8, 7] as a fraction of all codes, by row name; "all": of the tokens as they occur in the data.
    escape_rate: dict[str, float]
    # Root of the weighted mean square error of the output, relative to the 16-bit layer's on 16-bit inputs (no bias).
    output_error: float
    # Channels that may escape, by row name.
    masked_channels: dict[str, int]
    # How many channels the guard gave a larger step than the search chose, and the largest factor.
    guard_raised_channels: int
    guard_largest_raise: float
    # Sampled tokens that the massive row serves.
    massive_tokens: int
    # By modality: whether a row of its own serves it, and why; empty where rows of their own were not asked for.
    modality_rows: dict[str, RowChoice] = field(default_factory=dict)


def escape_rates(codes: Tensor, tokens: TokenSample, massive: Tensor, row_names: tuple[str, ...]) -> dict[str, float]:
    """Escapes as a fraction of codes [own T, K], as LayerRecord holds them.

    massive, bool [T], of all processes' tokens: those that took the last row.
    """
    own = torch.cat([activation.escapes(part).float().mean(1) for part in chunks(codes)])
    per_token = tokens.merge(own).cpu()
    rates = {row: float(per_token[tokens.modality == row].mean()) for row in tokens.counts}
    total = sum(tokens.counts.values())
    overall = sum(rates[row] * count / total for row, count in tokens.counts.items())
    named = {row_names[row]: rate for row, rate in rates.items()}
    if bool(massive.any()):
        named[row_names[-1]] = float(per_token[massive.cpu()].mean())
    return {**named, "all": overall}


def output_error(
    codes: Tensor,
    target: Tensor,
    token_set: Tensor,
    weight: Tensor,
    matrix: Tensor,
    served: Tensor,
    bias: Tensor,
    processes: Processes = ONE,
) -> float:
    """Weighted relative error of the served layer's output against target @ matrix.T; bias [S, N] by set of tokens.

    Each process has some of the tokens.
    """
    error = power = 0.0
    runs = (value.split(RUN_TOKENS) for value in (codes, target, token_set, weight))
    for part, values, which, token_weight in zip(*runs, strict=True):
        expected = values @ matrix.T
        found = part @ served.T + bias[which]
        error += float(token_weight @ (found - expected).square().sum(1))
        power += float(token_weight @ expected.square().sum(1))
    error, power = processes.reduce(torch.tensor([error, power], dtype=torch.float64), "SUM").tolist()
    return (error / power) ** 0.5 if power > 0 else 0.0
