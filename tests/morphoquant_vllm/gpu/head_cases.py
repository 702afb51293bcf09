"""What the interpreter process does with the 8-bit head: logits of random heads beside the torch reference's."""

from __future__ import annotations

import torch

from morphoquant_vllm.gpu import head as gpu_head
from morphoquant_vllm.numerics import head as numerics


def error(tokens: int, outputs: int, channels: int, dtype: torch.dtype) -> float:
    """Largest difference over what `output_bound` allows; over 1 is too much. The last output has a scale of 0."""
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn((outputs, channels), generator=generator).to(dtype)
    weight[-1] = 0
    codes, scale = numerics.quantize_outputs(weight)
    # Tokens that do not lie side by side.
    x = torch.randn((tokens, 2 * channels), generator=generator).to(dtype)[:, :channels]
    y = gpu_head.head(x, codes, scale)
    expected = numerics.head(x, codes, scale)
    assert y.dtype is dtype and y.shape == expected.shape
    return float(((y.double() - expected.double()).abs() / numerics.output_bound(x, codes, scale, expected)).max())


def check(damage: float) -> None:
    """The check of a loaded head whose scales are `damage` times those that the reference is given."""
    codes, scale = numerics.quantize_outputs(torch.randn((70, 64), generator=torch.Generator().manual_seed(1)))
    reference = numerics.head
    try:
        numerics.head = lambda x, weight, factors: reference(x, weight, factors * damage)
        gpu_head.check(codes, scale, torch.bfloat16)
    finally:
        numerics.head = reference
