"""Random 8-bit heads for the CPU kernel, and the comparison with the torch reference."""

import torch
from torch import Tensor

from morphoquant_vllm import cpu_head
from morphoquant_vllm.cpu_build import Kernels
from morphoquant_vllm.numerics.head import head, output_bound, quantize_rows

# N, K: N below, at and past tiles of 4 and of 8; of the last, the cache takes 8 tokens at a time.
HEADS = ((1, 16), (4, 32), (7, 48), (24, 112), (29, 528), (12, 8192))
TOKENS = (1, 2, 3, 4, 5, 8, 11)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head_case(outputs: int, channels: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] of a dtype, codes and scale; one row of weights is 0."""
    generator = torch.Generator().manual_seed(outputs + channels + tokens)
    weight = torch.randn(outputs, channels, generator=generator) * torch.rand(outputs, 1, generator=generator)
    weight[outputs // 2] *= outputs > 1
    return torch.randn(tokens, channels, generator=generator).to(dtype), *quantize_rows(weight)


def compare_heads(library: Kernels) -> None:
    """Every head and number of tokens: outputs within `output_bound`, and those of one token in every batch."""
    for outputs, channels in HEADS:
        for index, tokens in enumerate(TOKENS):
            x, codes, scale = head_case(outputs, channels, tokens, DTYPES[index % 3])
            y, expected = cpu_head.head(x, codes, scale, library), head(x, codes, scale)
            assert y.dtype is x.dtype
            near = (y.double() - expected.double()).abs() <= output_bound(x, codes, scale, expected)
            assert bool(near.all()), f"{outputs}x{channels}, {tokens} tokens: {int((~near).sum())} outside the bound"
            assert torch.equal(cpu_head.head(x[-1:], codes, scale, library), y[-1:])
