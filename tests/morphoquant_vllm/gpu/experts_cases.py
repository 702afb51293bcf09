"""What the interpreter process does with routed experts: each stage beside the torch reference.

Imported there only for its functions that import Triton; the data class is plain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm.gpu import experts as gpu_experts
from morphoquant_vllm.gpu import tiles
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.tiles import Architecture, Tile
from morphoquant_vllm.numerics import linear
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts, experts_bound, routed, weighted_sum
from tests.experts import random_experts, random_routing, random_tokens, record_of


@dataclass(frozen=True)
class Case:
    """One layer of experts, its tokens and how the kernels run it."""

    tokens: int
    slots: int
    count: int
    hidden: int
    between: int
    group_size: int
    two_level: bool
    dtype: torch.dtype = torch.bfloat16
    block_n: int = 32
    block_m: int = 16
    joined: bool = False
    in_order: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        shape = f"M{self.tokens}x{self.slots}-E{self.count}-K{self.hidden}-I{self.between}-G{self.group_size}"
        kinds = "-two-level" * self.two_level + "-joined" * self.joined + "-in-order" * self.in_order
        return f"{shape}-{self.block_n}x{self.block_m}-{kind}{kinds}"

    @property
    def profile(self) -> Profile:
        """A device whose only tile is that of the case."""
        sizes = (self.block_n, self.block_m, 4, 2, 1, self.joined)
        tile = Tile(None, (32, 64, 128), self.two_level, *sizes, 1, 1, adds_splits=False, reason="test")
        int8 = tiles.load(tiles.DEFAULT_TABLE)["sm_80"].int8
        made = Architecture("test", "nvidia", (), 1, 1, 1, 1, int8, (tile,), "test")
        return Profile(made, 4, inline_assembly=False, pdl=False)


@dataclass(frozen=True)
class Agreement:
    """How the stages lie beside the reference's."""

    # Largest differences over what is allowed, of gate and up and of the layer; over 1 is too much.
    product_error: float
    output_error: float
    codes_equal: bool
    rows_equal: bool
    massive: int  # pairs that are
    # Relative difference of the whole layer, from x on.
    whole: float


def record_of_case(case: Case) -> ExpertsRecord:
    """Random records; the channels of one expert come in order, or those of all."""
    stored = random_experts(case.count, case.hidden, case.between, group_size=case.group_size, two_level=case.two_level)
    record = record_of(stored)
    ordered = slice(None) if case.in_order else slice(1)
    record.intermediate.channel_order[ordered] = torch.arange(case.between, dtype=torch.int32)
    return record


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a buffer of rows longer than the tokens, weights, and ids: some of other ranks, most of one expert."""
    x, modality = random_tokens(case.tokens, case.hidden)
    weights, ids = random_routing(case.tokens, case.slots, case.count)
    generator = torch.Generator().manual_seed(case.tokens)
    wild = torch.rand(ids.shape, generator=generator)
    ids[wild > 0.7] = 1
    ids[wild < 0.1] = -1
    ids[(wild > 0.1) & (wild < 0.15)] = case.count
    return x.to(case.dtype), torch.cat((modality, modality)), weights, ids


def compare(case: Case) -> Agreement:
    """Run every stage on random experts."""
    record, (x, modality, weights, ids), profile = record_of_case(case), inputs(case), case.profile
    prepared, tile = gpu_experts.prepare(record), profile.architecture.tiles[0]
    blocks = gpu_experts.sorted_blocks(ids.flatten(), case.count, case.block_m)
    rows = modality[: case.tokens]
    products = gpu_experts.gate_up(x, rows, case.slots, blocks, prepared, tile, profile)
    each = rows.repeat_interleave(case.slots)
    codes, found_rows = gpu_experts.quantize(products, each, ids.flatten(), prepared.intermediate)
    input_rows = token_rows(x, rows, record.input)
    input_codes = act_quant(x, input_rows, record.input)
    gate, up = products.chunk(2, dim=1)
    h = silu(gate) * up
    product_error, codes_equal, rows_equal, massive = 0.0, True, True, 0
    for index, tokens, slots in routed(ids, case.count):
        pairs = tokens * case.slots + slots
        weight, _, activation = record.expert(index)
        terms = input_codes[tokens], input_rows[tokens], weight, record.input.gain
        expected = linear.matmul(*terms, None).to(case.dtype)
        allowed = linear.output_bound(*terms, expected)
        error = (products[pairs].double() - expected.double()).abs() / allowed
        product_error = max(product_error, float(error.max()))
        own_rows = token_rows(h[pairs], rows[tokens], activation)
        rows_equal &= torch.equal(found_rows[pairs], own_rows)
        codes_equal &= torch.equal(codes[pairs], act_quant(h[pairs], own_rows, activation))
        massive += int((own_rows == record.input.gain.numel() - 1).sum())
    y = gpu_experts.run_on(x, modality, weights, ids, prepared, profile)
    shaped = torch.where(((ids >= 0) & (ids < case.count))[:, :, None], h.view(*ids.shape, -1), 0)
    expected = weighted_sum(shaped, rows, weights, ids, record).to(case.dtype)
    allowed = experts_bound(shaped, rows, weights, ids, record, expected)
    assert y.shape == x.shape and y.dtype is case.dtype
    reference = experts(x, rows, weights, ids, record)
    return Agreement(
        product_error=product_error,
        output_error=float(((y.double() - expected.double()).abs() / allowed).max()),
        codes_equal=codes_equal,
        rows_equal=rows_equal,
        massive=massive,
        whole=float((y.double() - reference.double()).norm() / reference.double().norm()),
    )


def sums_are_exact(case: Case) -> bool:
    """Whether sums of the largest products, of codes -128 and weights -8, are the reference's integers."""
    record, profile = record_of_case(case), case.profile
    record.gate_up.codes[:] = 0
    scale = torch.full_like(record.gate_up.scale, 16 if case.two_level else 1)
    ones = torch.ones_like(record.gate_up.channel_scale)
    zeros = torch.zeros_like(record.gate_up.absorbed_bias)
    weight = record.gate_up._replace(scale=scale, channel_scale=ones, absorbed_bias=zeros)
    prepared = gpu_experts.prepare(record._replace(gate_up=weight))
    codes = torch.full((case.tokens, case.hidden), -128, dtype=torch.int8)
    rows = torch.zeros(case.tokens, dtype=torch.int32)
    ids = torch.arange(case.tokens * case.slots, dtype=torch.int32) % case.count
    blocks = gpu_experts.sorted_blocks(ids, case.count, case.block_m)
    gain = torch.full((case.count, record.input.gain.numel()), 1 / 16)
    tile = profile.architecture.tiles[0]
    y = gpu_experts.multiply(codes, rows, case.slots, blocks, prepared.gate_up, gain, torch.float32, tile, profile)
    expected = 128 * 8 * case.hidden * (16 if case.two_level else 1)
    return bool((y == expected).all())


def self_check(two_level: bool, damaged: str) -> None:
    """The check of a loaded layer, one of whose kernels is `damaged`: multiply, quantize, add, or none."""
    from morphoquant_vllm.gpu import experts_check

    record = record_of(random_experts(2, two_level=two_level))
    for problem in (experts_check.problem_of_product, experts_check.problem_of_quantizer, experts_check.problem_of_sum):
        problem.cache_clear()
    profile = Case(1, 1, 2, 64, 96, 32, two_level).profile
    with pytest.MonkeyPatch.context() as patch:
        if damaged:
            patch.setattr(gpu_experts, damaged, _damaged(getattr(gpu_experts, damaged)))
        experts_check.check("layer", record, torch.bfloat16, profile)


def _damaged(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` whose result, or last argument, is wrong."""

    def run(*arguments: Any) -> Any:
        found = function(*arguments)
        first = arguments[-1] if found is None else found[0] if isinstance(found, tuple) else found
        first += 3
        return found

    return run
