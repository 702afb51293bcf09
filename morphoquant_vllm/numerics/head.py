"""8 bits for lm_head, weights only: the definition, in torch.

    codes[n, k] = rint(w[n, k] / scale[n]),  scale[n] = max_k |w[n, k]| / 127
    y[m, n]     = scale[n] * sum_k codes[n, k] * x[m, k]

The codes are made from the 16-bit head while a model is loaded; no checkpoint holds them. M tokens, K channels, N
outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.numerics.linear import FLOAT32_ROUNDING, last_place

LARGEST_CODE = 127
# Outputs quantized at a time: bounds the float32 copy.
_OUTPUTS = 4096


def quantize_outputs(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale float32 [N] of a float weight [N, K]; an output of zeros has scale 0.

    If `codes` is given, they are written there.
    """
    codes = weight.new_empty(weight.shape, dtype=torch.int8) if codes is None else codes
    scale = weight.new_empty(weight.shape[:1], dtype=torch.float32)
    for first in range(0, weight.shape[0], _OUTPUTS):
        outputs = weight[first : first + _OUTPUTS].float()
        scales = outputs.abs().amax(1) / LARGEST_CODE
        scale[first : first + _OUTPUTS] = scales
        codes[first : first + _OUTPUTS] = (outputs / scales.where(scales > 0, 1)[:, None]).round()
    return codes, scale


def head(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """y [M, N] in the dtype of x [M, K]; summed in float64 and cast once."""
    return (x.double() @ codes.double().T * scale.double()).to(x.dtype)


def rounding_bound(x: Tensor, scale: Tensor) -> Tensor:
    """Largest difference between y and x times the unquantized weight before either is cast, float64 [M, N].

    Each weight moves by at most half a scale. The 2^-13 cover the division's float32 rounding of a code up to 127.
    """
    return (0.5 + 2.0**-13) * x.double().abs().sum(1)[:, None] * scale.double()


def output_bound(x: Tensor, codes: Tensor, scale: Tensor, reference: Tensor) -> Tensor:
    """Largest difference of another implementation's y from `reference` [M, N] (in its dtype), float64 [M, N].

    One unit in the last place of the output dtype, plus K + 2 half roundings of float32 (2^-24) of the sum of
    magnitudes.
    """
    magnitude = x.double().abs() @ codes.double().abs().T * scale.double()
    return last_place(reference) + (x.shape[1] + 2) * FLOAT32_ROUNDING / 2 * magnitude
