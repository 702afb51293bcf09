"""What the interpreter process does: run kernels beside the torch reference and report how they agree.

Imported there only for its functions that import Triton; the data classes are plain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.gpu import layout
from morphoquant_vllm.gpu.tiles import Tile
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.limits import MAX_LEVEL
from morphoquant_vllm.numerics.linear import WeightRecord
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

ROWS = 6


@dataclass(frozen=True)
class Case:
    """One linear layer, its input and how the kernel runs it."""

    tokens: int
    out_features: int
    in_features: int
    group_size: int
    splits: int = 1
    block_n: int = 32
    block_m: int = 16
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    blocks: int = 1
    two_level: bool = False
    joined: bool = False
    in_order: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        tile = f"{self.block_n}x{self.block_m}x{self.splits}"
        shape = f"M{self.tokens}-N{self.out_features}-K{self.in_features}-G{self.group_size}"
        kinds = "-bias" * self.bias + "-two-level" * self.two_level + "-joined" * self.joined
        kinds += "-in-order" * self.in_order
        return f"{shape}-{tile}-{kind}-B{self.blocks}{kinds}"

    @property
    def tile(self) -> Tile:
        sizes = (self.block_n, self.block_m, 4, 2, 1, self.joined)
        return Tile(None, (32, 64, 128), self.two_level, *sizes, 1, 16, adds_splits=False, reason="test")


@dataclass(frozen=True)
class Agreement:
    """How the kernels' results lie beside the reference's."""

    codes_equal: bool
    rows_equal: bool
    massive: int  # tokens that are
    escapes: int  # codes outside 4 bits
    # Largest difference of an output over what output_bound allows; over 1 is too much.
    output_error: float


def layer(case: Case) -> tuple[WeightRecord, ActivationRecord]:
    """Canonical records of a random layer, of `blocks` blocks of K."""
    scheme = TWO_LEVEL_SCHEME if case.two_level else GROUP_SCHEME
    settings = (case.in_features, case.out_features, case.group_size, "row", "layer")
    spec_layer = LayerSpec(*settings, scale_scheme=scheme)
    spec = QuantizationSpec(layers={"layer": spec_layer}, tensor_parallel=case.blocks)
    generator = torch.Generator().manual_seed(case.in_features + case.out_features)
    weight = torch.randn(case.out_features, case.in_features, generator=generator)
    (tensors,) = random_group([weight], spec_layer, spec, torch.tensor(case.group_size))
    if case.in_order:
        tensors["channel_order"] = torch.arange(case.in_features, dtype=torch.int32)
    return weight_of(tensors), activation_of(tensors)


def tokens(case: Case, record: ActivationRecord) -> tuple[Tensor, Tensor]:
    """x [M, K] with values far off, NaN and infinities among them, and a row for each token.

    Tokens 0, 3, 6, ... are massive by the last block's intervals, tokens 1, 4, 7, ... are not.
    """
    generator = torch.Generator().manual_seed(case.tokens)
    x = torch.randn(case.tokens, case.in_features, generator=generator) * 3
    wild = torch.rand(x.shape, generator=generator)
    x[wild < 0.01] *= 100
    for share, value in ((0.996, float("nan")), (0.997, float("inf")), (0.998, -float("inf")), (0.999, 1e38)):
        x[wild > share] = value
    x[0::3, record.massive_channel[-1].long()] = 5.0
    x[1::3, record.massive_channel.flatten().long()] = -10.0
    return x.to(case.dtype), torch.randint(ROWS - 1, (case.tokens,), generator=generator, dtype=torch.int32)


def compare(case: Case) -> Agreement:
    """Run both kernels on a random layer."""
    from morphoquant_vllm.gpu import launch

    weight, record = layer(case)
    x, modality = tokens(case, record)
    bias = torch.linspace(-1, 1, case.out_features).to(case.dtype) if case.bias else None
    gpu_weight, gpu_activation = layout.prepare_weight(weight), layout.prepare_activation(record)
    codes, rows = launch.quantize(x, modality, gpu_activation, units=1)
    expected_rows = activation_numerics.token_rows(x, modality, record)
    expected_codes = activation_numerics.act_quant(x, expected_rows, record)
    y = launch.matmul(codes, rows, gpu_weight, gpu_activation.gain, bias, case.dtype, case.tile, case.splits, False)
    expected = linear_numerics.matmul(expected_codes, expected_rows, weight, record.gain, bias).to(case.dtype)
    bound = linear_numerics.output_bound(expected_codes, expected_rows, weight, record.gain, expected)
    error = (y.double() - expected.double()).abs() / bound
    return Agreement(
        codes_equal=torch.equal(codes, expected_codes),
        rows_equal=torch.equal(rows, expected_rows),
        massive=int((expected_rows == ROWS - 1).sum()),
        escapes=int(activation_numerics.escapes(expected_codes).sum()),
        output_error=float(error.max()),
    )


def group_sums_equal(case: Case) -> list[bool]:
    """Whether each group's sums, read out by a scale of 1 there and 0 elsewhere, are the reference's integers."""
    from morphoquant_vllm.gpu import launch

    generator = torch.Generator().manual_seed(case.tokens)
    codes = torch.randint(-128, 128, (case.tokens, case.in_features), generator=generator, dtype=torch.int8)
    weight, _ = layer(case)
    # The largest sums that there are: every product is -128 * -8.
    codes[0] = -128
    weight.codes[0] = 0
    expected = linear_numerics.group_sums(codes, weight)
    rows = torch.zeros(case.tokens, dtype=torch.int32)
    gain = torch.full((1,), 1 / 16)
    without_constant = torch.zeros(1, case.out_features)
    equal = []
    for group in range(weight.scale.shape[1]):
        scale = torch.zeros_like(weight.scale)
        scale[:, group] = 1
        prepared = layout.prepare_weight(weight._replace(scale=scale, absorbed_bias=without_constant))
        y = launch.matmul(codes, rows, prepared, gain, None, torch.float32, case.tile, case.splits, False)
        equal.append(torch.equal(y, expected[:, :, group].float()))
    return equal


def level_sums_equal(case: Case) -> bool:
    """Whether the level-weighted sums over the whole K are the reference's integers, of random levels; K <= 1024.

    The largest there is among them: every product is -128 * -8 * 16. Up to 2^24 a float32 holds them all.
    """
    from morphoquant_vllm.gpu import launch

    generator = torch.Generator().manual_seed(case.tokens)
    codes = torch.randint(-128, 128, (case.tokens, case.in_features), generator=generator, dtype=torch.int8)
    weight, _ = layer(case)
    level = torch.randint(1, MAX_LEVEL + 1, weight.scale.shape, generator=generator).to(torch.uint8)
    codes[0] = -128
    weight.codes[0], level[0] = 0, MAX_LEVEL
    expected = (linear_numerics.group_sums(codes, weight).long() * level.long()).sum(-1)
    assert int(expected[0, 0]) == 2**14 * case.in_features <= 2**24
    ones, zeros = torch.ones(case.out_features), torch.zeros(1, case.out_features)
    prepared = layout.prepare_weight(weight._replace(scale=level, channel_scale=ones, absorbed_bias=zeros))
    rows = torch.zeros(case.tokens, dtype=torch.int32)
    gain = torch.full((1,), 1 / 16)
    y = launch.matmul(codes, rows, prepared, gain, None, torch.float32, case.tile, case.splits, False)
    return torch.equal(y.long(), expected)


def edges_agree(dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Rows by the kernel and by the reference, of tokens on and beside the edges of an interval."""
    from morphoquant_vllm.gpu import launch

    _, record = layer(Case(1, 32, 64, 32))
    low, high = torch.full((1, 4), -1.5), torch.full((1, 4), 24.0)
    record = record._replace(massive_low=low, massive_high=high)
    values = torch.tensor([-1.5, 24.0, float("nan"), float("inf"), -float("inf"), -1.515625, 24.25, 0.0])
    x = torch.zeros(len(values), 64)
    x[:, record.massive_channel[0, 0].long()] = values
    x = x.to(dtype)
    modality = torch.full((len(values),), 2, dtype=torch.int32)
    rows = launch.quantize(x, modality, layout.prepare_activation(record), units=1)[1]
    return rows.tolist(), activation_numerics.token_rows(x, modality, record).tolist()


def ties_agree() -> bool:
    """Codes of values half-way between two codes, on both limits and beyond, in float32, gain and step 1."""
    from morphoquant_vllm.gpu import launch

    _, record = layer(Case(1, 32, 1024, 32))
    x = ((torch.arange(2 * 1024) - 1024) / 4).view(2, 1024)
    record = record._replace(
        inverse=torch.ones_like(record.inverse),
        centre=torch.zeros_like(record.centre),
        massive_low=torch.ones(1, 4),
        massive_high=torch.zeros(1, 4),
    )
    modality = torch.tensor([0, 4], dtype=torch.int32)
    codes = launch.quantize(x, modality, layout.prepare_activation(record), units=1)[0]
    return torch.equal(codes, activation_numerics.act_quant(x, modality, record))


class AlignedTokens:
    """The quantizer of channels in order, launched only on tokens that begin on 16 bytes, multiples of 16 apart."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> Any:
            x = arguments["x_ptr"]
            assert x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and arguments["x_stride"] == x.stride(0)
            return self.kernel[grid](**arguments)

        return run


def strided_input_agrees(case: Case, first: int, width: int) -> bool:
    """Codes of a slice from channel `first` on of wider tokens: its rows do not follow each other."""
    from morphoquant_vllm.gpu import launch, quantize_launch

    _, record = layer(case)
    x, modality = tokens(case, record)
    wide = torch.cat((x, x), 1)[:, :width].contiguous()[:, first : first + case.in_features]
    rows = activation_numerics.token_rows(wide, modality, record)
    kernel = quantize_launch.quantize_in_order
    quantize_launch.quantize_in_order = AlignedTokens(kernel)
    try:
        codes = launch.quantize(wide, modality, layout.prepare_activation(record), units=1)[0]
    finally:
        quantize_launch.quantize_in_order = kernel
    return torch.equal(codes, activation_numerics.act_quant(wide, rows, record))


@dataclass(frozen=True)
class FusedAgreement:
    """The quantizer with silu(gate) * up in it beside torch's own silu(gate) * up and the reference quantizer."""

    other_inputs: int  # values of silu(gate) * up that the kernel rounded the other way, by its codes
    rows_equal: bool
    massive: int  # tokens that are
    escapes: int  # codes outside 4 bits


def silu_mul(case: Case) -> FusedAgreement:
    """Quantize gate and up at once, NaN, infinities and values far off among them."""
    from morphoquant_vllm.gpu import launch

    _, record = layer(case)
    up, modality = tokens(case, record)
    gate, _ = tokens(replace(case, tokens=case.tokens + 1), record)
    gate = gate[: case.tokens].clone()
    # silu(20) is 20 in 16 bit: 20 * 0.25 lies in the massive intervals, 20 * -0.5 does not.
    gate[:, record.massive_channel.flatten().long()] = 20.0
    up[0::3, record.massive_channel[-1].long()] = 0.25
    up[1::3, record.massive_channel.flatten().long()] = -0.5
    x = torch.nn.functional.silu(gate) * up
    rows = activation_numerics.token_rows(x, modality, record)
    expected = activation_numerics.act_quant(x, rows, record)
    prepared = layout.prepare_activation(record)
    codes, found_rows = launch.quantize(torch.cat((gate, up), 1), modality, prepared, silu_mul=True, units=1)
    return FusedAgreement(
        other_inputs=int((codes != expected).sum()),
        rows_equal=torch.equal(found_rows, rows),
        massive=int((rows == ROWS - 1).sum()),
        escapes=int(activation_numerics.escapes(codes).sum()),
    )
