"""The kernels' layout of weights and tables, read back by its definition."""

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.gpu import layout
from morphoquant_vllm.numerics.weights import unpack
from tests.morphoquant_vllm.gpu.cases import Case, layer


def read_back(weight: layout.GpuWeight, out_features: int, in_features: int) -> Tensor:
    """int4 codes int8 [N, K], nibble by nibble; what is filled up has weight 0, or with two-level scales level 0."""
    tiles, steps, rows, half = weight.codes.shape
    codes = torch.zeros(tiles * rows, steps * 2 * half, dtype=torch.int8)
    for p in range(half):
        byte = weight.codes[..., p].transpose(1, 2).reshape(tiles * rows, steps)
        for first, nibble in ((p, byte & 0xF), (p + half, byte >> 4)):
            signed = nibble.int() - 8 if weight.two_level else torch.where(nibble > 7, nibble.int() - 16, nibble.int())
            codes[:, first :: 2 * half] = signed.to(torch.int8)
    if not weight.two_level:
        assert not bool(codes[out_features:].any())
        assert not bool(codes[:, in_features:].any())
    return codes[:out_features, :in_features]


@pytest.mark.parametrize("case", [Case(1, 33, 96, 32), Case(1, 300, 64, 64), Case(1, 128, 384, 128)], ids=str)
def test_every_weight_and_scale_is_where_the_kernels_look(case: Case) -> None:
    weight, _ = layer(case)
    prepared = layout.prepare_weight(weight)
    assert torch.equal(read_back(prepared, case.out_features, case.in_features), unpack(weight.codes))
    # 32 bits for each tile of K: two scales of G = 32, the first one lower, or one of a larger G.
    found = prepared.scale.T.contiguous()
    if case.group_size == 32:
        found = found.view(torch.bfloat16)
    groups = case.in_features // case.group_size
    assert torch.equal(found[: case.out_features, :groups].float(), weight.scale.float())
    assert not bool(found[case.out_features :].any()) and not bool(found[:, groups:].any())
    assert layout.group_size_of(prepared) == case.group_size


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 33, 96, 32, two_level=True),
        Case(1, 300, 192, 64, two_level=True),
        Case(1, 128, 384, 128, two_level=True),
    ],
    ids=str,
)
def test_every_weight_and_level_is_where_the_kernels_look(case: Case) -> None:
    weight, _ = layer(case)
    prepared = layout.prepare_weight(weight)
    assert prepared.two_level and prepared.codes.shape[3] == 32, "tiles of 64 channels"
    assert torch.equal(read_back(prepared, case.out_features, case.in_features), unpack(weight.codes))
    # A byte for each 32 channels, the lowest first.
    found = prepared.scale.T.contiguous().view(torch.uint8)
    assert found.shape[1] == 4 * -(-case.in_features // 128)
    expected = weight.scale.repeat_interleave(case.group_size // 32, 1)
    assert torch.equal(found[: case.out_features, : expected.shape[1]], expected)
    assert not bool(found[case.out_features :].any()) and not bool(found[:, expected.shape[1] :].any())
    assert torch.equal(prepared.channel_scale, weight.channel_scale * 16)


def test_repacking_in_parts_gives_the_same_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = layer(Case(1, 400, 128, 32))
    whole = layout.prepare_weight(weight)
    monkeypatch.setattr(layout, "REPACK_OUTPUTS", 128)
    assert torch.equal(layout.prepare_weight(weight).codes, whole.codes)


@pytest.mark.parametrize(("group_size", "two_level"), [(32, False), (64, False), (128, False), (64, True)])
def test_weights_are_held_once(group_size: int, two_level: bool) -> None:
    """4 bits a weight and no more, where N and K need no filling up; levels take a byte for 32 of them."""
    case = Case(1, 256, 512, group_size, two_level=two_level)
    prepared = layout.prepare_weight(layer(case)[0])
    weights = case.out_features * case.in_features
    assert prepared.codes.numel() == weights // 2
    assert prepared.scale.nbytes == (weights // 32 if two_level else 4 * weights // max(64, group_size))


def test_the_order_of_channels_that_are_in_order_is_not_kept() -> None:
    shuffled, in_order = (layout.prepare_activation(layer(Case(1, 32, 96, 32, in_order=flag))[1]) for flag in (0, 1))
    assert shuffled.channel_order.numel() == 96 and not shuffled.in_order
    assert in_order.channel_order.numel() == 0 and in_order.in_order
    assert shuffled.in_features == in_order.in_features == 96


def test_filled_up_sets_of_intervals_hold_no_token() -> None:
    case = Case(1, 32, 96, 32, blocks=3)
    prepared = layout.prepare_activation(layer(case)[1])
    assert prepared.massive_channel.shape == (4, 4)
    assert bool((prepared.massive_low[3] > prepared.massive_high[3]).all())
