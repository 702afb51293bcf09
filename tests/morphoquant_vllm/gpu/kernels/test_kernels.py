"""The kernels, interpreted on the CPU, against the torch reference: equal codes and sums, outputs within the bound."""

from dataclasses import replace

import pytest
import torch

from tests.morphoquant_vllm.gpu import cases
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.interpreter import Interpreter

# Between them: M of one, of tile tails and of several tiles; N that no tile divides; every group size; K that leaves
# half a tile of weights (96, 288); split K with a short last part; both 16-bit types and float32; one to four blocks.
SAMPLE = [
    Case(1, 48, 64, 32),
    Case(1, 160, 256, 64, splits=2),
    Case(1, 72, 512, 128, splits=4, bias=True),
    Case(2, 33, 96, 32, splits=2, block_n=16, bias=True),
    Case(5, 130, 288, 32, splits=5, dtype=torch.float16),
    Case(7, 64, 192, 64, splits=3, dtype=torch.float16, bias=True, blocks=3),
    Case(15, 40, 384, 128, splits=2, blocks=3),
    Case(16, 256, 128, 128, block_n=128),
    Case(17, 96, 128, 32, dtype=torch.float32, blocks=2),
    Case(31, 100, 320, 64, block_n=64, block_m=32, splits=2),
    Case(64, 64, 256, 32, block_n=64, block_m=64, blocks=4),
    Case(65, 129, 128, 64, block_n=64, block_m=64, dtype=torch.float16),
    Case(100, 200, 256, 128, block_n=128, block_m=64, splits=2, bias=True),
    Case(128, 128, 160, 32, block_n=128, block_m=128),
    Case(129, 136, 128, 128, block_n=128, block_m=128, dtype=torch.float16),
    Case(512, 72, 64, 64, block_n=128, block_m=256, dtype=torch.float32, bias=True),
]
# K that leaves a half (32), a whole tile and more (96, 160, 320, 640) of a turn of 128 channels; M of several parts.
TWO_LEVEL = [
    Case(1, 48, 64, 32, two_level=True),
    Case(2, 33, 96, 32, splits=1, block_n=16, bias=True, two_level=True),
    Case(5, 130, 288, 32, splits=2, dtype=torch.float16, two_level=True),
    Case(7, 64, 192, 64, splits=2, dtype=torch.float16, bias=True, blocks=3, two_level=True),
    Case(15, 40, 384, 128, splits=3, blocks=3, two_level=True),
    Case(65, 129, 128, 64, block_n=64, block_m=64, two_level=True),
    Case(129, 136, 160, 32, block_n=128, block_m=128, dtype=torch.float32, bias=True, two_level=True),
]
# One product a turn: G that fills a tile, and two-level scales at every G, with and without K left for half a turn.
JOINED = [
    Case(7, 64, 192, 64, splits=3, dtype=torch.float16, bias=True, blocks=3, joined=True),
    Case(65, 130, 384, 128, block_n=64, block_m=64, bias=True, joined=True),
    Case(129, 136, 256, 128, block_n=128, block_m=128, splits=2, joined=True),
    Case(2, 33, 96, 32, block_n=16, bias=True, two_level=True, joined=True),
    Case(65, 129, 320, 64, block_n=64, block_m=64, splits=3, dtype=torch.float16, two_level=True, joined=True),
    Case(129, 136, 160, 32, block_n=128, block_m=128, dtype=torch.float32, bias=True, two_level=True, joined=True),
    Case(40, 40, 384, 128, block_n=128, block_m=64, splits=3, blocks=3, two_level=True, joined=True),
]
# Channels that come in order: few and many tokens, channels that fill no block, several blocks of massive intervals.
IN_ORDER = [
    Case(1, 32, 64, 32, in_order=True),
    Case(7, 32, 1152, 64, dtype=torch.float16, blocks=3, in_order=True),
    Case(128, 32, 1056, 32, in_order=True),
    Case(131, 32, 96, 32, dtype=torch.float16, in_order=True),
    Case(150, 32, 256, 64, dtype=torch.float32, blocks=4, in_order=True),
]
TWO_LEVEL_SUMS = [
    Case(3, 20, 96, 32, two_level=True),
    Case(18, 140, 1024, 32, splits=3, two_level=True),
    Case(3, 20, 320, 64, two_level=True),
    Case(3, 20, 640, 128, splits=2, block_n=64, two_level=True),
    Case(18, 140, 1024, 32, splits=3, two_level=True, joined=True),
    Case(3, 20, 288, 32, two_level=True, joined=True),
]
SUMS = [
    Case(3, 20, 96, 32),
    Case(3, 20, 128, 32, splits=2),
    Case(3, 140, 192, 64),
    Case(18, 20, 256, 64, splits=3),
    Case(3, 20, 256, 128, block_n=64),
    Case(3, 20, 384, 128, splits=3),
    Case(3, 140, 192, 64, joined=True),
    Case(18, 20, 384, 128, splits=3, block_n=64, joined=True),
]
# Every tail of M against every group size and split, and the largest tiles.
MATRIX = [
    Case(m, n, k, g, splits, block_n, block_m, dtype, bias, blocks)
    for m, block_n, block_m in ((1, 64, 16), (3, 32, 16), (16, 16, 16), (33, 64, 32), (127, 128, 128), (512, 128, 128))
    for n in (1, 127, 384)
    for g, k in ((32, 96), (32, 512), (64, 320), (128, 640))
    for splits, dtype, bias, blocks in ((1, torch.bfloat16, True, 1), (3, torch.float16, False, k // g))
]
# The same of two-level scales, whose turns are 128 channels: fewer parts of a small K.
MATRIX += [replace(case, two_level=True, splits=min(case.splits, -(-case.in_features // 128))) for case in MATRIX]
MATRIX += [
    replace(case, joined=True) for case in MATRIX if case.block_m > 16 and (case.two_level or case.group_size > 32)
]


def assert_agrees(interpreter: Interpreter, case: Case) -> None:
    found = interpreter(cases.compare, case)
    assert found.codes_equal
    assert found.rows_equal
    assert found.output_error <= 1
    assert found.massive > 0
    if case.tokens > 1:
        assert found.massive < case.tokens
    if case.tokens * case.in_features > 1000:
        assert found.escapes > 0


@pytest.mark.parametrize("case", SAMPLE + TWO_LEVEL + JOINED + IN_ORDER, ids=str)
def test_kernels_agree_with_the_reference(interpreter: Interpreter, case: Case) -> None:
    assert_agrees(interpreter, case)


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_group_sums_are_the_reference_integers(interpreter: Interpreter, case: Case) -> None:
    equal = interpreter(cases.group_sums_equal, case)
    assert equal == [True] * (case.in_features // case.group_size)


@pytest.mark.parametrize("case", TWO_LEVEL_SUMS, ids=str)
def test_level_weighted_sums_are_the_reference_integers(interpreter: Interpreter, case: Case) -> None:
    assert interpreter(cases.level_sums_equal, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_massive_tokens_on_the_edges_of_an_interval(interpreter: Interpreter, dtype: torch.dtype) -> None:
    rows, expected = interpreter(cases.edges_agree, dtype)
    assert rows == expected == [5, 5, 2, 2, 2, 2, 2, 5]


def test_ties_round_to_even_and_limits_hold(interpreter: Interpreter) -> None:
    assert interpreter(cases.ties_agree)


@pytest.mark.parametrize(("first", "width"), [(3, 128), (0, 72), (0, 128)])
@pytest.mark.parametrize(("tokens", "in_order"), [(5, False), (130, False), (5, True), (130, True)])
def test_rows_of_the_input_may_lie_apart(
    interpreter: Interpreter, tokens: int, in_order: bool, first: int, width: int
) -> None:
    """And anywhere: those that begin on no 16 bytes are copied for the quantizer that reads 16 bytes at a time."""
    assert interpreter(cases.strided_input_agrees, Case(tokens, 32, 64, 32, in_order=in_order), first, width)


@pytest.mark.full
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_the_matrix_agrees_with_the_reference(interpreter: Interpreter, case: Case) -> None:
    assert_agrees(interpreter, case)
