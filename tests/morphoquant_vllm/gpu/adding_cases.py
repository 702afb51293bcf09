"""What the interpreter process does with the product that adds the parts of a split K itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from morphoquant_vllm.gpu import layout
from tests.morphoquant_vllm.gpu.cases import ROWS, Case, layer


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
    counters = adding_launch.counters(case.tile, 64, codes.device)
    found = []
    for order in orders:
        parts = torch.full((case.splits, *expected.shape), 7, dtype=product.sums)
        y = torch.full_like(expected, float("nan"))
        described = adding_launch.multiply_and_add(product, codes, rows, bias, parts, y, counters, case.tile)
        with parts_in_order(order):
            described.run()
        found.append(torch.equal(y, expected) and not bool(counters.any()))
    return found
