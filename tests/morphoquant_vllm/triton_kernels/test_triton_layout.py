"""The kernels' layout of weights and tables, read back by its definition."""

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.numerics.weights import unpack
from morphoquant_vllm.triton_kernels import layout
from tests.morphoquant_vllm.triton_kernels.cases import Case, layer


def read_back(weight: layout.GpuWeight, out_features: int, in_features: int) -> Tensor:
    """int4 codes int8 [N, K], nibble by nibble."""
    tiles, steps, rows, half = weight.codes.shape
    codes = torch.zeros(tiles * rows, steps * 2 * half, dtype=torch.int8)
    for p in range(half):
        byte = weight.codes[..., p].transpose(1, 2).reshape(tiles * rows, steps)
        for first, nibble in ((p, byte & 0xF), (p + half, byte >> 4)):
            codes[:, first :: 2 * half] = torch.where(nibble > 7, nibble.int() - 16, nibble.int()).to(torch.int8)
    assert not bool(codes[out_features:].any()), "what is filled up has weight 0"
    assert not bool(codes[:, in_features:].any())
    return codes[:out_features, :in_features]


@pytest.mark.parametrize("case", [Case(1, 33, 96, 32), Case(1, 300, 64, 64), Case(1, 128, 384, 128)], ids=str)
def test_every_weight_and_scale_is_where_the_kernels_look(case: Case) -> None:
    weight, _ = layer(case)
    prepared = layout.prepare_weight(weight)
    assert torch.equal(read_back(prepared, case.out_features, case.in_features), unpack(weight.codes))
    groups = case.in_features // case.group_size
    assert torch.equal(prepared.scale[:groups, : case.out_features].T, weight.scale)
    assert layout.group_size_of(prepared) == case.group_size


def test_repacking_in_parts_gives_the_same_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = layer(Case(1, 400, 128, 32))
    whole = layout.prepare_weight(weight)
    monkeypatch.setattr(layout, "REPACK_ROWS", 128)
    assert torch.equal(layout.prepare_weight(weight).codes, whole.codes)


def test_weights_are_held_once() -> None:
    """4 bits a weight and no more, where N and K need no filling up."""
    case = Case(1, 256, 512, 64)
    prepared = layout.prepare_weight(layer(case)[0])
    assert prepared.codes.numel() == case.out_features * case.in_features // 2
    assert prepared.scale.numel() == case.out_features * case.in_features // case.group_size


def test_filled_up_sets_of_intervals_hold_no_token() -> None:
    case = Case(1, 32, 96, 32, blocks=3)
    prepared = layout.prepare_activation(layer(case)[1])
    assert prepared.massive_channel.shape == (4, 4)
    assert bool((prepared.massive_low[3] > prepared.massive_high[3]).all())
