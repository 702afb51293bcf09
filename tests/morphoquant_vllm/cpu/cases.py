"""Random layers for the CPU kernels, and the comparison with the torch reference.

As a program (`python -m tests.morphoquant_vllm.cpu.cases LIBRARY INSTRUCTIONS`) it runs every case on a library: the
sanitizer's test runs it so.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu.build import Kernels, load
from morphoquant_vllm.numerics import activation, linear
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record
from tests.morphoquant_vllm.cpu.head_cases import compare_bfloat16_heads, compare_heads

# N, K, G: every group size; N below, at and past blocks of 16 and panels; K within, at and past a strip of 512.
SHAPES = (
    (1, 32, 32),
    (16, 64, 64),
    (17, 128, 128),
    (48, 96, 32),
    (70, 640, 64),
    (33, 1056, 32),
    (146, 1152, 128),
)
# Every remainder of the tiles; past 24 tokens two-level weights are unpacked to bytes.
TOKENS = (1, 2, 3, 5, 7, 8, 13, 16, 26)
# More than a panel takes at a time, and more channels than one thread quantizes.
MANY = ((40, 128, 64, 200), (18, 2304, 128, 3))
ROWS = 4
# Group scales or two-level ones, and 8-bit weights, which have group scales.
SCHEMES = ("group", "two_level", "eight_bit")


def case(
    outputs: int, channels: int, group_size: int, scheme: str = "group", seed: int = 0
) -> tuple[WeightRecord, ActivationRecord]:
    """Random canonical records; every fourth channel or so may escape, about 1 token in 16 is massive.

    `scheme` is one of SCHEMES.
    """
    two_level = scheme == "two_level"
    generator = torch.Generator().manual_seed(outputs * channels + group_size + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    groups = (outputs, channels // group_size)
    if scheme == "eight_bit":
        codes = torch.randint(-128, 128, (outputs, channels), generator=generator, dtype=torch.int8)
    else:
        codes = torch.randint(256, (outputs, channels // 2), generator=generator, dtype=torch.uint8)
    weight = weight_record(
        codes,
        torch.randint(1, 17, groups, generator=generator).byte() if two_level else (normal(*groups) * 0.1).bfloat16(),
        normal(1, ROWS, outputs) * 30,
        normal(outputs).abs() * 0.02 if two_level else None,
    )
    record = ActivationRecord(
        inverse=normal(ROWS, channels).abs() * 3 + 0.1,
        centre=normal(ROWS, channels),
        mask=normal(ROWS, channels) > 0.7,
        gain=normal(ROWS).abs() + 0.5,
        channel_order=torch.randperm(channels, generator=generator).int(),
        massive_channel=torch.randint(channels, (2, 3), generator=generator, dtype=torch.int32),
        massive_low=torch.tensor([[1.0, -9.0, -9.0], [1.5, -0.5, -9.0]]),
        massive_high=torch.full((2, 3), 1e30),
    )
    return weight, record


def tokens_of(tokens: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs with outliers, halves (ties), NaN and infinities, and a buffer of rows longer than the tokens."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, channels, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.05] *= 60
    for value in (float("nan"), float("inf"), -float("inf"), -0.0, 0.5):
        x[torch.rand(x.shape, generator=generator) < 0.01] = value
    return x.to(dtype), torch.randint(ROWS, (tokens + 3,), generator=generator, dtype=torch.int32)


def compare(
    weight: WeightRecord, record: ActivationRecord, x: Tensor, modality: Tensor, bias: Tensor | None, library: Kernels
) -> None:
    """Assert that codes are equal and outputs within `output_bound`."""
    rows = activation.token_rows(x, modality[: x.shape[0]], record)
    codes = activation.act_quant(x, rows, record)
    expected = linear.matmul(codes, rows, weight, record.gain, bias).to(x.dtype)
    packed, prepared = cpu.prepare(weight, record)
    assert torch.equal(cpu.act_quant(x, modality, prepared, library), codes)
    y = cpu.linear(x, modality, packed, prepared, bias, library)
    assert y.dtype is x.dtype
    bound = linear.output_bound(codes, rows, weight, record.gain, expected)
    # Past float16's range both are the same infinity; the difference is NaN there.
    near = ((y.double() - expected.double()).abs() <= bound) | (y == expected)
    assert bool(near.all()), f"{int((~near).sum())} of {near.numel()} outputs outside the bound"


def compare_shape(outputs: int, channels: int, group_size: int, library: Kernels) -> None:
    """`compare` over schemes of scales, TOKENS, dtypes, with a bias of the same or another dtype, and without one."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for scheme in SCHEMES:
        weight, record = case(outputs, channels, group_size, scheme)
        for index, tokens in enumerate(TOKENS):
            dtype, bias_dtype = dtypes[index % 3], (*dtypes, None)[(index + outputs) % 4]
            bias = None if bias_dtype is None else torch.linspace(-1, 1, outputs).to(bias_dtype)
            compare(weight, record, *tokens_of(tokens, channels, dtype), bias, library)


def compare_many(library: Kernels) -> None:
    """`compare` for more tokens than a panel holds, and for a token that threads share."""
    for outputs, channels, group_size, tokens in MANY:
        for scheme in SCHEMES:
            weight, record = case(outputs, channels, group_size, scheme)
            compare(weight, record, *tokens_of(tokens, channels, torch.bfloat16), None, library)


def compare_in_order(library: Kernels) -> None:
    """`compare` for channels that come in channel order, in every dtype."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (outputs, channels, group_size), dtype in zip(SHAPES[1:4], dtypes, strict=True):
        weight, record = case(outputs, channels, group_size)
        record = record._replace(channel_order=torch.arange(channels, dtype=torch.int32))
        for tokens in TOKENS:
            compare(weight, record, *tokens_of(tokens, channels, dtype), None, library)


def main() -> None:
    """Every case with 1 and 2 threads on the library named on the command line."""
    # Not at the top: that module imports this one.
    from tests.morphoquant_vllm.cpu.experts_cases import compare_experts

    library = load(Path(sys.argv[1]), sys.argv[2])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            compare_shape(*shape, library)
        compare_many(library)
        compare_in_order(library)
        compare_heads(library)
        compare_experts(library)
        if library.head_bfloat16 is not None:
            compare_bfloat16_heads(library)
    print("all cases agree")


if __name__ == "__main__":
    main()
