"""Random heads for the CPU kernels, 8-bit and bfloat16, and the comparison with the torch reference."""

import torch
from torch import Tensor

from morphoquant_vllm.cpu import head as cpu_head
from morphoquant_vllm.cpu.build import Kernels
from morphoquant_vllm.numerics.head import head, output_bound, quantize_outputs

# N, K: N below, at and past tiles of 4 and of 8; of the last, the cache takes 8 tokens at a time.
HEADS = ((1, 16), (4, 32), (7, 48), (24, 112), (29, 528), (12, 8192))
TOKENS = (1, 2, 3, 4, 5, 8, 11)
# bfloat16: N below, at and past a step of 24, and K past a vector of 32; the last is split into strips.
BFLOAT16_HEADS = ((1, 32), (23, 64), (24, 96), (77, 160), (50, 2080))
# Every remainder of tiles of 8, and more than a chunk.
BFLOAT16_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 21, 131)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head_case(outputs: int, channels: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] of a dtype, codes and scale; one row of weights is 0."""
    generator = torch.Generator().manual_seed(outputs + channels + tokens)
    weight = torch.randn(outputs, channels, generator=generator) * torch.rand(outputs, 1, generator=generator)
    weight[outputs // 2] *= outputs > 1
    return torch.randn(tokens, channels, generator=generator).to(dtype), *quantize_outputs(weight)


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


def bfloat16_case(outputs: int, channels: int, tokens: int) -> tuple[Tensor, Tensor]:
    """x [M, K] and weight [N, K], bfloat16; channels of very different size."""
    generator = torch.Generator().manual_seed(outputs + channels + tokens)
    size = torch.rand(channels, generator=generator) ** 8 * 100
    x = torch.randn(tokens, channels, generator=generator) * size
    return x.bfloat16(), torch.randn(outputs, channels, generator=generator).bfloat16()


def compare_bfloat16_heads(library: Kernels) -> None:
    """Every head and number of tokens: as `compare_heads`; the reference is that of codes whose scale is 1."""
    for outputs, channels in BFLOAT16_HEADS:
        one = torch.ones(outputs)
        for tokens in BFLOAT16_TOKENS:
            x, weight = bfloat16_case(outputs, channels, tokens)
            y, expected = cpu_head.head_bfloat16(x, weight, library), head(x, weight, one)
            assert y.dtype is torch.bfloat16
            near = (y.double() - expected.double()).abs() <= output_bound(x, weight, one, expected)
            assert bool(near.all()), f"{outputs}x{channels}, {tokens} tokens: {int((~near).sum())} outside the bound"
            assert torch.equal(cpu_head.head_bfloat16(x[-1:], weight, library), y[-1:])
