"""Layers with two-level scales against their definition, and the bound of other backends."""

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant
from morphoquant_vllm.numerics.linear import WeightRecord, group_sums, linear, matmul, output_bound, weight_record
from tests.checkpoints import random_group
from tests.morphoquant_vllm.numerics.test_linear import IN, OUT, TOKENS, over_ranks, random_layer, rounding_of_constants
from tests.records import activation_of, weight_of


def two_level_layer(group_size: int, seed: int = 0) -> tuple[WeightRecord, ActivationRecord, Tensor, Tensor]:
    """`random_layer` with levels 1 to 16 and channel scales that are not short fractions in float32."""
    weight, activation, x, modality = random_layer(group_size, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    level = torch.randint(1, 17, weight.scale.shape, generator=generator).to(torch.uint8)
    channel_scale = torch.rand(OUT, generator=generator) / 300 + 1e-3
    two_level = weight_record(weight.codes, level, weight.absorbed_bias[None], channel_scale)
    assert two_level.two_level and not weight.two_level
    return two_level, activation, x, modality


def level_sums(codes: Tensor, weight: WeightRecord) -> Tensor:
    """sum_g level * sum_{p in g} code * q, int64 [M, N]."""
    groups = weight.scale.shape[1]
    q = weights.unpack(weight.codes).long().view(-1, groups, codes.shape[1] // groups)
    sums = torch.einsum("mgk,ngk->mng", codes.long().view(codes.shape[0], groups, -1), q)
    return (sums * weight.scale.long()).sum(-1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_matmul_of_two_level_scales_is_the_definition(group_size: int) -> None:
    weight, activation, x, modality = two_level_layer(group_size)
    codes = act_quant(x, modality, activation)
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(9))
    rows = modality.long()
    # The same operations in the same order: integers, then three roundings of float64.
    expected = level_sums(codes, weight).double() * weight.channel_scale.double()
    expected = expected * activation.gain.double()[rows, None] + weight.absorbed_bias.double()[rows] + bias.double()
    assert torch.equal(matmul(codes, modality, weight, activation.gain, bias), expected)
    y = linear(x, modality, weight, activation, bias)
    assert torch.equal(y, expected.float())


def test_two_level_sums_are_exact_at_their_largest() -> None:
    """Over the longest K that the format allows in whole groups; the next code would be lost in float32."""
    channels = 131_040
    q = torch.full((1, channels), -8, dtype=torch.int8)
    level = torch.full((1, channels // 32), 16, dtype=torch.uint8)
    record = weight_record(weights.pack(q), level, torch.zeros(1, 1, 1), torch.ones(1))
    codes = torch.full((2, channels), -128, dtype=torch.int8)
    codes[1, -1] = -127
    y = matmul(codes, torch.zeros(2, dtype=torch.int32), record, torch.ones(1), None).flatten().tolist()
    assert y == [2**14 * channels, 2**14 * channels - 128]
    assert y[0] < 2**31


def test_group_scales_of_both_schemes() -> None:
    grouped, *_ = random_layer(64)
    assert torch.equal(grouped.group_scales(), grouped.scale.double())
    weight, *_ = two_level_layer(64)
    expected = weight.scale.double() * weight.channel_scale.double()[:, None]
    assert torch.equal(weight.group_scales(), expected)
    served = weights.unpack(weight.codes).double() * expected.repeat_interleave(64, 1)
    # One float32 rounding.
    assert torch.allclose(weight.dequantized().double(), served, rtol=2.0**-24, atol=0)


def two_level_float32_backend(codes: Tensor, modality: Tensor, weight: WeightRecord, gain: Tensor) -> Tensor:
    """The steps of a kernel: one integer sum over the whole K, everything after it in float32."""
    y = level_sums(codes, weight).float() * weight.channel_scale
    return y * gain[modality.long(), None] + weight.absorbed_bias[modality.long()]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("wrong", [None, "level", "weight code"])
def test_bound_of_two_level_scales(group_size: int, wrong: str | None) -> None:
    weight, activation, x, modality = two_level_layer(group_size)
    codes = act_quant(x, modality, activation)
    expected = matmul(codes, modality, weight, activation.gain, None).float()
    used, matters = weight, torch.ones(TOKENS, OUT, dtype=torch.bool)
    if wrong == "level":
        level = weight.scale.clone()
        level[:, 1] = level[:, 1] % 16 + 1
        used = weight._replace(scale=level)
        matters = group_sums(codes, weight)[:, :, 1] != 0
    elif wrong:
        changed = weights.unpack(weight.codes)
        changed[:, 100] += torch.where(changed[:, 100] < 0, 1, -1).to(torch.int8)
        used = weight._replace(codes=weights.pack(changed))
        matters = (codes[:, 100] != 0)[:, None].expand(TOKENS, OUT)
    ours = two_level_float32_backend(codes, modality, used, activation.gain)
    over = (ours.double() - expected.double()).abs() > output_bound(codes, modality, weight, activation.gain, expected)
    assert matters.sum() > TOKENS * OUT // 2
    assert over[matters].all() if wrong else not over.any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_a_two_level_layer_sum_to_the_whole(ranks: int) -> None:
    layer = LayerSpec(IN, OUT, 32, "row", "down", scale_scheme="two_level")
    full = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    spec = QuantizationSpec(layers={"down": layer}, tensor_parallel=2)
    tensors = random_group([full], layer, spec, torch.tensor(0))[0]
    assert int(tensors["weight_level"].min()) < 16 == int(tensors["weight_level"].max())
    tensors["massive_low"] = tensors["massive_high"] + 1
    x = torch.randn(20, IN, generator=torch.Generator().manual_seed(9))
    modality = torch.arange(20, dtype=torch.int32) % 5
    record, weight = activation_of(tensors), weight_of(tensors)
    whole = matmul(act_quant(x, modality, record), modality, weight, record.gain, None)
    assert (over_ranks(x, modality, tensors, ranks) - whole).abs().max() <= rounding_of_constants(tensors)
    # The layer is the 16-bit one, but for rounding: a level or a scale in a wrong place would cost all of it.
    expected = x.double() @ full.double().T
    assert float((whole - expected).norm() / expected.norm()) < 0.5
