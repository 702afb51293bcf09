"""What the interpreter process does with the product that adds the parts of a split K itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from morphoquant_vllm.gpu import layout
from tests.morphoquant_vllm.gpu.cases import ROWS, Case, layer, tokens


@contextmanager
def parts_in_order(order: list[int]) -> Iterator[None]:
    """Let the interpreter run the programs of a grid's second dimension in this order, those of the first one mixed."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    sound, mixed = builder.set_grid_idx, {}

    def permuted(x: int, y: int, z: int) -> None:
        tiles = builder.grid_dim[0]
        mixed.setdefault(tiles, random.Random(1).sample(range(tiles), tiles))
        sound(mixed[tiles][x], order[y], z)

    builder.set_grid_idx = permuted
    try:
        yield
    finally:
        builder.set_grid_idx = sound


def adds_as_two_launches(case: Case, orders: list[list[int]]) -> list[bool]:
    """For each order in which the parts end: whether the bits are those of two launches, and the counters zeros."""
    from morphoquant_vllm.gpu import adding_launch, launch
    from morphoquant_vllm.gpu.product_launch import Product

    generator = torch.Generator().manual_seed(case.tokens)
    weight, record = layer(case)
    prepared, gain = layout.prepare_weight(weight), layout.prepare_activation(record).gain
    codes = torch.randint(-128, 128, (case.tokens, case.in_features), generator=generator, dtype=torch.int8)
    rows = torch.randint(ROWS, (case.tokens,), generator=generator, dtype=torch.int32)
    bias = torch.linspace(-1, 1, case.out_features).to(case.dtype) if case.bias else None
    expected = launch.matmul(codes, rows, prepared, gain, bias, case.dtype, case.tile, case.splits, False)
    product = Product(prepared, gain, inline_assembly=False, pdl=False)
    counters = torch.zeros(64, dtype=torch.int32)
    found = []
    for order in orders:
        parts = torch.full((case.splits, *expected.shape), 7, dtype=product.sums)
        y = torch.full_like(expected, float("nan"))
        described = adding_launch.multiply_and_add(product, codes, rows, bias, parts, y, counters, case.tile)
        with parts_in_order(order):
            described.run()
        found.append(torch.equal(y, expected) and not bool(counters.any()))
    return found


def linear_adds_as_two_launches(case: Case, units: int) -> tuple[bool, int]:
    """Whether `launch.linear` gives the same bits by either way; and how often it launched the kernel that adds."""
    from morphoquant_vllm.gpu import adding_launch, device, launch, tiles
    from tests.morphoquant_vllm.gpu.served import Counted

    weight, record = layer(case)
    x, modality = tokens(case, record)
    bias = torch.linspace(-1, 1, case.out_features).to(case.dtype) if case.bias else None
    records = layout.prepare_weight(weight), layout.prepare_activation(record)

    def linear(adds_splits: bool) -> torch.Tensor:
        tile = replace(case.tile, adds_splits=adds_splits)
        architecture = replace(tiles.load(tiles.DEFAULT_TABLE)["sm_80"], tiles=(tile,))
        profile = device.Profile(architecture, units, inline_assembly=False, pdl=False)
        return launch.linear(x, modality, *records, bias, profile)

    kernel = adding_launch.int4_gemm_adding
    adding_launch.int4_gemm_adding = Counted(kernel)
    try:
        same = torch.equal(linear(adds_splits=True), linear(adds_splits=False))
        return same, adding_launch.int4_gemm_adding.launches
    finally:
        adding_launch.int4_gemm_adding = kernel


def self_check(case: Case) -> list[str]:
    """What `selfcheck` says of a tile that adds the parts; and of it with another gain in its ending."""
    from morphoquant_vllm.gpu import adding_launch, device, selfcheck, tiles
    from morphoquant_vllm.gpu.launcher import Launch

    profile = device.Profile(tiles.load(tiles.DEFAULT_TABLE)["sm_80"], 4, inline_assembly=False, pdl=False)
    settings = (case.group_size, 2, case.dtype, torch.device("cpu"), profile)
    tile = replace(case.tile, adds_splits=True)
    found = [selfcheck.problem_of_tile(tile, *settings)]
    sound = adding_launch.multiply_and_add

    def wrong(*arguments: object) -> Launch:
        described = sound(*arguments)
        return replace(described, arguments=described.arguments | {"gain_ptr": 1.5 * described.arguments["gain_ptr"]})

    adding_launch.multiply_and_add = wrong
    selfcheck.problem_of_tile.cache_clear()
    try:
        return [*found, selfcheck.problem_of_tile(tile, *settings)]
    finally:
        adding_launch.multiply_and_add = sound
