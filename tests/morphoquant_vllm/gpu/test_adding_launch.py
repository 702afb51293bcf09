"""The product that adds the parts of a split K itself, interpreted: the bits of two launches, however programs end."""

import itertools
from dataclasses import replace

import pytest
import torch

from morphoquant_vllm.gpu import tiles
from tests.morphoquant_vllm.gpu import adding_cases
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.interpreter import Interpreter

# The kernel's GROUP_M is 8: more tiles of tokens than that, and tiles of tokens that several parts finish.
SAMPLE = [
    Case(1, 160, 256, 64, splits=2),
    Case(5, 70, 288, 32, splits=3, dtype=torch.float16, bias=True),
    Case(145, 33, 96, 32, splits=2, block_n=16),
    Case(37, 72, 512, 128, splits=3, block_n=64, block_m=64, bias=True),
    Case(7, 64, 384, 64, splits=3, two_level=True, bias=True),
    Case(40, 40, 384, 128, block_n=128, block_m=64, splits=3, two_level=True, joined=True),
]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_the_bits_are_those_of_two_launches(interpreter: Interpreter, case: Case) -> None:
    orders = [list(order) for order in itertools.permutations(range(case.splits))][:4]
    assert interpreter(adding_cases.adds_as_two_launches, case, orders) == [True] * len(orders)


@pytest.mark.parametrize("case", [replace(SAMPLE[1], in_features=544), replace(SAMPLE[5], in_features=768)], ids=str)
def test_a_tile_of_the_table_lets_a_linear_layer_add_its_parts(interpreter: Interpreter, case: Case) -> None:
    assert interpreter(adding_cases.linear_adds_as_two_launches, case, 64) == (True, 1)
    assert interpreter(adding_cases.linear_adds_as_two_launches, case, 1) == (True, 0), "K is not split"


def test_the_self_check_runs_a_tile_that_adds_its_parts(interpreter: Interpreter) -> None:
    sound, wrong = interpreter(adding_cases.self_check, SAMPLE[0])
    assert sound == ""
    assert "splits 2, which it adds) is off by" in wrong


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_counters_are_enough_for_every_product_of_the_table_that_splits(name: str) -> None:
    from morphoquant_vllm.gpu.adding_launch import most_counters

    for tile in tiles.load(tiles.DEFAULT_TABLE)[name].tiles:
        for units, tokens, out_features in itertools.product((1, 108, 132), (1, 16, 65, 300), (64, 3584, 37888)):
            if tiles.splits_of(tile, tokens, out_features, 1000, units) > 1:
                count = -(-tokens // tile.block_m) * -(-out_features // tile.block_n)
                assert count <= most_counters(tile, units)
