"""Weights of the served form: packing, order, int4 rounding, absorbed bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant_vllm.numerics import weights


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 5), pairs=st.integers(0, 40), seed=st.integers(0, 1000))
def test_unpack_is_the_inverse_of_pack(rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=generator, dtype=torch.int8)
    packed = weights.pack(codes)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (rows, pairs))
    assert torch.equal(weights.unpack(packed), codes)


def test_packing_of_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[None]
    codes = weights.unpack(packed)
    assert codes[0, :4].tolist() == [-8, -8, -7, -8], "the low nibble is the first channel; 0 stands for -8"
    assert torch.equal(weights.pack(codes), packed)


def test_pack_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="even K"):
        weights.pack(torch.zeros(1, 3, dtype=torch.int8))
    for code in (-9, 8):
        with pytest.raises(ValueError, match=r"\[-8, 7\]"):
            weights.pack(torch.full((1, 2), code, dtype=torch.int8))


def test_eight_bit_codes_are_stored_as_they_are() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)[None]
    assert torch.equal(weights.integer_codes(codes), codes)
    packed = weights.pack(codes.clamp(-8, 7))
    assert torch.equal(weights.integer_codes(packed), codes.clamp(-8, 7))
    scale = torch.full((1, 8), 1 / 3).bfloat16()
    served = weights.dequantize_weight(codes, scale)
    assert torch.equal(served.double(), codes.double() * float(scale[0, 0])), "no product is rounded"


@pytest.mark.parametrize("group_size", [32, 128])
def test_int8_is_within_half_a_step_of_every_weight(group_size: int) -> None:
    absorbed = random(6, 256, seed=3)
    absorbed[0, :group_size] = 0
    absorbed[1, 0] = 1e4
    codes, scale = weights.quantize_int8(absorbed, group_size)
    assert (codes.dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, torch.bfloat16, (6, 256 // group_size))
    assert bool((scale > 0).all()) and not codes[0, :group_size].any()
    error = (weights.dequantize_weight(codes, scale) - absorbed).abs()
    # The largest weight of a group may lie up to half a unit of bfloat16 beyond the last code.
    allowed = scale.float().repeat_interleave(group_size, 1) * (0.5 + 127 * 2**-8)
    assert bool((error <= allowed).all())
    assert float(error.square().mean().sqrt() / absorbed.square().mean().sqrt()) < 0.01


@settings(max_examples=25, deadline=None)
@given(blocks=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_order_permutes_within_blocks_and_sorts_the_norms(blocks: int, seed: int) -> None:
    sizes = torch.logspace(-2, 2, 32)[random(32, seed=seed + 1).argsort()]
    absorbed = random(5, 32, seed=seed) * sizes
    order = weights.channel_order(absorbed, blocks)
    assert order.dtype == torch.int32
    width = 32 // blocks
    for block in range(blocks):
        mine = order[block * width : (block + 1) * width].long()
        assert sorted(mine.tolist()) == list(range(block * width, (block + 1) * width))
        norms = absorbed.double()[:, mine].norm(dim=0)
        assert (norms.diff() <= 0).all()


def test_order_keeps_equal_norms_in_place_and_refuses_uneven_blocks() -> None:
    assert weights.channel_order(torch.ones(3, 8)).tolist() == list(range(8))
    with pytest.raises(ValueError, match="not divisible into 3"):
        weights.channel_order(torch.ones(3, 8), blocks=3)


def weighted_error(
    absorbed: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """Error of each row's groups, weighed by importance, float64 [N, K/G]."""
    group = absorbed.shape[1] // scale.shape[1]
    rounded = codes.double() * scale.double().repeat_interleave(group, 1)
    return ((rounded - absorbed.double()).square() * importance.double()).view(*scale.shape, group).sum(-1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_never_worse_than_plain_rounding(group_size: int) -> None:
    absorbed = random(20, 256).pow(3)
    importance = random(256, seed=1).square() * torch.logspace(-3, 3, 256)
    codes, scale = weights.quantize_int4(absorbed, importance, group_size)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    assert codes.min() >= -8
    assert codes.max() <= 7
    plain_scale = (absorbed.view(20, -1, group_size).abs().amax(-1) / 7).bfloat16()
    plain = torch.round(absorbed / plain_scale.float().repeat_interleave(group_size, 1)).clamp(-8, 7)
    ours = weighted_error(absorbed, codes, scale, importance)
    theirs = weighted_error(absorbed, plain, plain_scale, importance)
    # The search compares float32 sums of `group_size` terms.
    assert (ours <= theirs * (1 + group_size * 2.0**-23)).all()
    assert ours.sum() < 0.9 * theirs.sum(), "the clip search must pay on long-tailed weights"


def test_importance_steers_the_clip_search() -> None:
    absorbed = random(1, 32)
    absorbed[0, 0] = 8.0
    heavy_outlier, heavy_rest = torch.ones(32), torch.ones(32)
    heavy_outlier[0], heavy_rest[0] = 1e4, 1e-4
    scale_of = [weights.quantize_int4(absorbed, importance, 32)[1].item() for importance in (heavy_outlier, heavy_rest)]
    assert scale_of[0] > 1.5 * scale_of[1]


def test_codes_are_rounded_against_the_stored_scale() -> None:
    absorbed = random(4, 64)
    codes, scale = weights.quantize_int4(absorbed, torch.ones(64), 32)
    again = torch.round(absorbed / scale.float().repeat_interleave(32, 1)).clamp(-8, 7)
    assert torch.equal(codes.float(), again)


def test_groups_of_zeros() -> None:
    absorbed = random(3, 64)
    absorbed[:, :32] = 0
    codes, scale = weights.quantize_int4(absorbed, torch.ones(64), 32)
    assert (codes[:, :32] == 0).all()
    assert (scale > 0).all()
    assert scale.isfinite().all()


def test_weights_too_small_for_the_scale_stay_finite() -> None:
    codes, scale = weights.quantize_int4(torch.full((1, 32), 1e-44), torch.ones(32), 32)
    assert (scale > 0).all()
    assert codes.abs().max() <= 8


def test_group_size_must_divide_k() -> None:
    with pytest.raises(ValueError, match="K = 48 is not divisible by group size 32"):
        weights.quantize_int4(torch.zeros(2, 48), torch.ones(48), 32)


def test_dequantized_weight_is_exact() -> None:
    codes = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = random(6, 2).abs().bfloat16()
    ours = weights.dequantize_weight(weights.pack(codes), scale)
    assert torch.equal(ours.double(), codes.double() * scale.double().repeat_interleave(32, 1))


def test_absorb_and_absorbed_bias() -> None:
    weight, step, centre = random(5, 8).bfloat16(), random(8, seed=1).abs(), random(3, 8, seed=2)
    assert torch.equal(weights.absorb(weight, step), weight.float() * step)
    bias = weights.absorbed_bias(weight, centre)
    assert (bias.dtype, tuple(bias.shape)) == (torch.float32, (1, 3, 5))
    expected = [
        [sum(w * c for w, c in zip(row, row_centre, strict=True)) for row in weight.double().tolist()]
        for row_centre in centre.double().tolist()
    ]
    # float64 sums, cast to float32 once.
    assert torch.allclose(bias[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=2.0**-24, atol=1e-12)


def test_absorbed_bias_by_blocks_is_that_of_each_part_of_k() -> None:
    weight, centre = random(5, 32), random(3, 32, seed=2)
    bias = weights.absorbed_bias(weight, centre, blocks=4)
    assert bias.shape == (4, 3, 5)
    for block in range(4):
        part = slice(8 * block, 8 * block + 8)
        alone = weights.absorbed_bias(weight[:, part], centre[:, part])[0]
        # float64 sums, in another order, cast to float32 once.
        assert torch.allclose(bias[block], alone, rtol=2.0**-23, atol=1e-12)
