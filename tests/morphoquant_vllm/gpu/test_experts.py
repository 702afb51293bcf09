"""Routed experts on a GPU: their kernels in Triton's interpreter against the torch reference, and the sorting."""

from __future__ import annotations

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import backend, experts_layout, layout, load_checks, tiles
from morphoquant_vllm.gpu import experts as gpu_experts
from tests.experts import random_experts, record_of
from tests.morphoquant_vllm.gpu.experts_cases import Case, compare, self_check, sums_are_exact
from tests.morphoquant_vllm.gpu.interpreter import Interpreter

pytest.importorskip("triton", reason="needs triton")

# K and I at, below and past tiles of K; N past a tile of 128; one token, and blocks that are full and empty.
CASES = (
    Case(1, 2, 4, 64, 96, 32, two_level=True),
    Case(24, 2, 3, 192, 160, 32, two_level=True, in_order=True),
    Case(9, 3, 5, 128, 64, 64, two_level=True, dtype=torch.float16, block_m=64),
    Case(20, 2, 3, 128, 128, 128, two_level=True, block_m=32, joined=True),
    Case(7, 2, 4, 96, 160, 32, two_level=False),
    Case(24, 2, 3, 128, 64, 64, two_level=False, dtype=torch.float16, joined=True),
    Case(5, 1, 3, 256, 128, 128, two_level=False, dtype=torch.float32),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_agrees_with_the_reference(case: Case, interpreter: Interpreter) -> None:
    found = interpreter(compare, case)
    assert found.codes_equal and found.rows_equal
    assert found.product_error <= 1 and found.output_error <= 1
    assert found.massive > 0 or case.tokens < 20
    # The interpreter truncates to bfloat16, so codes after it differ.
    assert found.whole < 1e-3 or case.dtype is not torch.float32


@pytest.mark.parametrize("two_level", [False, True])
def test_the_largest_sums_are_exact(two_level: bool, interpreter: Interpreter) -> None:
    assert interpreter(sums_are_exact, Case(9, 2, 3, 192, 64, 32, two_level=two_level))


@pytest.mark.parametrize(("pairs", "count", "block"), [(1, 4, 16), (100, 4, 16), (33, 7, 8), (64, 128, 16), (5, 1, 16)])
def test_sorting_puts_each_pair_into_a_block_of_its_expert(pairs: int, count: int, block: int) -> None:
    generator = torch.Generator().manual_seed(pairs)
    ids = torch.randint(-1, count + 1, (pairs,), generator=generator, dtype=torch.int32)
    found = gpu_experts.sorted_blocks(ids, count, block)
    assert found.expert.numel() == gpu_experts.most_blocks(pairs, count, block) and found.pair.dtype is torch.int32
    seen = []
    for index, expert in enumerate(found.expert.tolist()):
        own = [pair for pair in found.pair[index * block : (index + 1) * block].tolist() if pair < pairs]
        assert bool(own) == (expert < count) and own == sorted(own)
        assert all(int(ids[pair]) == expert for pair in own)
        seen += own
    assert sorted(seen) == [pair for pair in range(pairs) if 0 <= int(ids[pair]) < count]


@pytest.mark.parametrize(("pairs", "count", "block"), [(1, 4, 16), (17, 4, 16), (64, 8, 8), (100, 3, 64)])
def test_there_are_blocks_for_the_worst_routing_and_no_more(pairs: int, count: int, block: int) -> None:
    most = gpu_experts.most_blocks(pairs, count, block)
    # Every expert but one has one pair.
    others = min(pairs, count) - 1
    worst = others + -(-(pairs - others) // block)
    used = max(
        int((gpu_experts.sorted_blocks(ids, count, block).expert < count).sum())
        for ids in (
            torch.arange(pairs, dtype=torch.int32) % count,
            torch.arange(pairs, dtype=torch.int32).clamp(max=count - 1),
        )
    )
    assert worst <= most and used <= most and most <= pairs // block + min(pairs, count)


def test_sorting_asks_the_device_for_nothing() -> None:
    """On meta tensors a read of a value raises; the shapes follow from sizes alone."""
    found = gpu_experts.sorted_blocks(torch.zeros(64, dtype=torch.int32, device="meta"), 8, 16)
    assert found.pair.shape == (16 * found.expert.numel(),)


def test_no_token_gives_no_output() -> None:
    prepared = experts_layout.prepare(record_of(random_experts(2)))
    empty = torch.zeros(0, 2)
    modality = torch.zeros(0, dtype=torch.int32)
    y = gpu_experts.run_on(
        torch.zeros(0, 64).bfloat16(), modality, empty, empty.int(), prepared, Case(1, 1, 2, 64, 96, 32, True).profile
    )
    assert y.shape == (0, 64) and y.dtype is torch.bfloat16


@pytest.mark.parametrize("two_level", [False, True])
def test_the_layout_is_each_experts_own_and_keeps_the_handle(two_level: bool) -> None:
    record = record_of(random_experts(3, two_level=two_level))
    prepared = experts_layout.prepare(record)
    for index in range(3):
        gate_up, down, intermediate = record.expert(index)
        for whole, one in ((prepared.gate_up, gate_up), (prepared.down, down)):
            for part, expected in zip(whole, layout.prepare_weight(one), strict=True):
                assert torch.equal(part[index], expected)
        own = layout.prepare_activation(intermediate)
        assert torch.equal(prepared.intermediate.limit[index], own.limit)
        assert torch.equal(prepared.intermediate.massive_low[index], own.massive_low)
    assert prepared.down.absorbed_bias.data_ptr() == record.down.absorbed_bias.data_ptr()
    assert prepared.size == 3


def test_tiles_follow_the_pairs_of_an_expert() -> None:
    architecture = tiles.load(tiles.DEFAULT_TABLE)["sm_80"]
    sizes = [gpu_experts.tile_of(architecture, pairs, 128, 32, True).block_m for pairs in (8, 2048, 2049, 4096, 10**6)]
    assert sizes == [16, 16, 32, 32, 64]


def test_what_the_kernels_do_not_serve_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_checks, "check_device", lambda name, device: None)
    name, record = "model.layers.0.mlp.experts", record_of(random_experts(2))
    with pytest.raises(MorphoQuantError, match=rf"{name}: activations in torch\.float32"):
        backend.check_experts(name, record, torch.float32)
    narrow = record._replace(down=record.down._replace(scale=record.down.scale[:, :, :2]))
    with pytest.raises(MorphoQuantError, match=rf"{name}: K = 96 in 2 groups"):
        backend.check_experts(name, narrow, torch.bfloat16)


@pytest.mark.parametrize("two_level", [False, True])
def test_loaded_experts_are_checked(two_level: bool, interpreter: Interpreter) -> None:
    interpreter(self_check, two_level, "")


@pytest.mark.parametrize(
    ("damaged", "words"), [("multiply", "kernel of"), ("quantize", "quantizer of"), ("add", "weighted sum of")]
)
def test_a_wrong_kernel_is_refused(damaged: str, words: str, interpreter: Interpreter) -> None:
    with pytest.raises(MorphoQuantError, match=f"layer: the {words} experts"):
        interpreter(self_check, True, damaged)
