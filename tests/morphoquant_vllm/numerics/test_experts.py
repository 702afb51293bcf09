"""A mixture of experts against its definition from linears, and the bound that other backends are held to."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts, experts_bound, intermediate, weighted_sum
from morphoquant_vllm.numerics.linear import group_sums, linear, matmul
from tests.experts import Expert, random_experts, random_routing, random_tokens, record_of
from tests.records import activation_of, rank_part, weight_of

COUNT, TOP, TOKENS = 5, 2, 13


def by_definition(x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, stored: list[Expert]) -> Tensor:
    """Token by token and slot by slot, each linear as a layer of its own; float64 [M, K]."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        one, row = x[token : token + 1], modality[token : token + 1]
        for weight, index in zip(topk_weights[token].tolist(), topk_ids[token].tolist(), strict=True):
            gate, up, down = stored[index]
            h = silu(linear(one, row, weight_of(gate), activation_of(gate)))
            h = h * linear(one, row, weight_of(up), activation_of(up))
            record = activation_of(down)
            rows = token_rows(h, row, record)
            y[token] += weight * matmul(act_quant(h, rows, record), rows, weight_of(down), record.gain, None)[0]
    return y


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_the_sum_of_their_linears(dtype: torch.dtype, two_level: bool) -> None:
    stored = random_experts(COUNT, two_level=two_level)
    x, modality = random_tokens(TOKENS)
    routing = random_routing(TOKENS, TOP, COUNT)
    y = experts(x.to(dtype), modality, *routing, record_of(stored))
    expected = by_definition(x.to(dtype), modality, *routing, stored)
    assert y.dtype == dtype
    # Cast once; float64 sums of other heights and orders differ far below a float32 rounding.
    assert torch.allclose(y.double(), expected.to(dtype).double(), rtol=2.0**-22 if dtype == torch.float32 else 0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 4),
    ids=st.lists(st.lists(st.integers(-2, 5), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_any_routing_is_the_sum_over_the_experts_at_hand(seed: int, count: int, ids: list[list[int]]) -> None:
    """Ids of other ranks, an expert twice, experts that nobody chose."""
    stored = random_experts(count, 32, 32, seed=seed)
    topk_ids = torch.tensor(ids)
    x, modality = random_tokens(len(ids), 32, seed)
    topk_weights = torch.rand(topk_ids.shape, generator=torch.Generator().manual_seed(seed))
    here = (topk_ids >= 0) & (topk_ids < count)
    record = record_of(stored)
    y = weighted_sum(intermediate(x, modality, topk_ids, record), modality, topk_weights, topk_ids, record)
    expected = by_definition(x, modality, topk_weights * here, topk_ids.clamp(0, count - 1), stored)
    # Products of other heights sum in another order, in float64.
    assert torch.allclose(y, expected, rtol=1e-11, atol=1e-11)
    # Experts in another order, with ids that follow them.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = record_of([stored[index] for index in order.tolist()])
    renumbered = torch.where(here, order.argsort()[topk_ids.clamp(0, count - 1)], -1)
    h = intermediate(x, modality, renumbered, moved)
    assert torch.allclose(weighted_sum(h, modality, topk_weights, renumbered, moved), y, rtol=1e-11, atol=1e-11)


def test_massive_tokens_of_the_input_and_of_down_are_told_apart() -> None:
    record = record_of(random_experts(COUNT))
    x, modality = random_tokens(200)
    _, ids = random_routing(200, 1, COUNT)
    h = intermediate(x, modality, ids, record)
    before = token_rows(x, modality, record.input) == 5
    after = torch.cat([token_rows(h[t], modality[t : t + 1], record.expert(int(ids[t]))[2]) == 5 for t in range(200)])
    assert {(a, b) for a, b in zip(before.tolist(), after.tolist(), strict=True)} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


@pytest.mark.parametrize("other", [-1, COUNT])
def test_ids_of_other_ranks_add_nothing(other: int) -> None:
    record = record_of(random_experts(COUNT))
    x, modality = random_tokens(TOKENS)
    topk_weights, ids = random_routing(TOKENS, TOP, COUNT)
    elsewhere = ids.clone()
    elsewhere[:, 1] = other
    ours = experts(x, modality, topk_weights, elsewhere, record)
    assert torch.equal(ours, experts(x, modality, topk_weights[:, :1], ids[:, :1], record))
    assert not experts(x, modality, topk_weights, torch.full_like(ids, other), record).any()


def test_ranks_that_share_the_experts_sum_to_the_layer() -> None:
    stored = random_experts(4)
    x, modality = random_tokens(TOKENS)
    topk_weights, ids = random_routing(TOKENS, TOP, 4)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for rank in range(2):
        own = record_of(stored[2 * rank : 2 * rank + 2])
        local = ids - 2 * rank
        h = intermediate(x, modality, local, own)
        total += weighted_sum(h, modality, topk_weights, local, own)
    assert torch.allclose(total, by_definition(x, modality, topk_weights, ids, stored), rtol=1e-12)


def cut(expert: Expert, rank: int) -> Expert:
    """One of two tensor-parallel ranks: gate and up cut in N, down in blocks of K."""
    gate, up, down = expert
    along_n = dict.fromkeys(("weight_codes", "weight_level", "weight_channel_scale"), 0) | {"absorbed_bias": 2}
    halves = [shard | {n: shard[n].chunk(2, d)[rank] for n, d in along_n.items()} for shard in (gate, up)]
    return halves[0], halves[1], rank_part(down, rank, 2)


def test_tensor_parallel_ranks_sum_to_the_layer_if_no_token_is_massive() -> None:
    stored = random_experts(3, intermediate=128, blocks=2)
    for _, _, down in stored:
        down["massive_high"] = down["massive_low"] - 1
    x, modality = random_tokens(TOKENS)
    routing = random_routing(TOKENS, TOP, 3)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for rank in range(2):
        own = record_of([cut(expert, rank) for expert in stored])
        total += weighted_sum(intermediate(x, modality, routing[1], own), modality, *routing, own)
    # absorbed_bias is rounded to float32 per block, and once more in the sum of the blocks.
    assert torch.allclose(total, by_definition(x, modality, *routing, stored), atol=1e-5)


def test_no_token() -> None:
    record = record_of(random_experts(COUNT))
    x, modality = random_tokens(0)
    assert experts(x, modality, torch.zeros(0, TOP), torch.zeros(0, TOP, dtype=torch.int64), record).shape == (0, 64)


# --- the bound


def float32_backend(
    h: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, record: ExpertsRecord
) -> Tensor:
    """The steps of a kernel after h: integer group sums, everything else in float32, in the order of the slots."""
    y = torch.zeros(h.shape[0], record.down.codes.shape[1])
    for token in range(h.shape[0]):
        for slot, index in enumerate(topk_ids[token].tolist()):
            _, down, activation = record.expert(index)
            rows = token_rows(h[token, slot : slot + 1], modality[token : token + 1], activation)
            codes = act_quant(h[token, slot : slot + 1], rows, activation)
            sums = group_sums(codes, down).float()[0]
            out = torch.zeros(sums.shape[0])
            for group in range(sums.shape[1]):
                out += sums[:, group] * down.scale[:, group].float()
            out = out * down.channel_scale if down.two_level else out
            out = out * activation.gain[int(rows)] + down.absorbed_bias[int(rows)]
            y[token] += topk_weights[token, slot] * out
    return y


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_is_loose_enough_for_float32_sums(two_level: bool, dtype: torch.dtype) -> None:
    record = record_of(random_experts(COUNT, two_level=two_level))
    for seed in range(3):
        x, modality = random_tokens(TOKENS, seed=seed)
        routing = random_routing(TOKENS, TOP, COUNT, seed)
        h = intermediate(x.to(dtype), modality, routing[1], record)
        reference = weighted_sum(h, modality, *routing, record).to(dtype)
        ours = float32_backend(h, modality, *routing, record).to(dtype)
        bound = experts_bound(h, modality, *routing, record, reference)
        assert ((ours.double() - reference.double()).abs() <= bound).all()


@pytest.mark.parametrize("wrong", ["weight code", "weight of a slot", "row"])
def test_bound_is_tight_enough_to_catch_one_mistake(wrong: str) -> None:
    record = record_of(random_experts(COUNT))
    x, modality = random_tokens(TOKENS)
    topk_weights, ids = random_routing(TOKENS, TOP, COUNT)
    h = intermediate(x, modality, ids, record)
    reference = weighted_sum(h, modality, topk_weights, ids, record).float()
    bound = experts_bound(h, modality, topk_weights, ids, record, reference)
    used_weights, used_rows, used = topk_weights, modality, record
    if wrong == "weight code":
        codes = torch.stack([weights.unpack(expert) for expert in record.down.codes])
        codes[:, :, 7] += torch.where(codes[:, :, 7] < 0, 1, -1).to(torch.int8)
        packed = torch.stack([weights.pack(expert) for expert in codes])
        used = record._replace(down=record.down._replace(codes=packed))
    elif wrong == "weight of a slot":
        used_weights = topk_weights * (1 + 2.0**-14)
    else:
        used_rows = (modality + 1) % 5
    ours = float32_backend(h, used_rows, used_weights, ids, used)
    caught = (ours.double() - reference.double()).abs() > bound
    # A code of zero, or a massive token, hides the mistake.
    assert caught.float().mean() > 0.25
