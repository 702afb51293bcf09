"""The int8 path, interpreted on the CPU, against the torch reference: equal weights and sums, outputs in the bound."""

import pytest
import torch

from tests.morphoquant_vllm.gpu import int8_cases
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.interpreter import Interpreter

# K that no block and no pair of tiles divides (96, 160, 320), N and M that no block divides, every group size, several
# rows, both 16-bit types, a bias; blocks of more than one part of the ending.
CASES = [
    (Case(1, 33, 96, 32, two_level=True), 64),
    (Case(70, 140, 160, 32, block_n=64, block_m=64, bias=True, two_level=True), 64),
    (Case(19, 130, 320, 64, block_n=128, dtype=torch.float16, bias=True, two_level=True), 128),
    (Case(130, 48, 1024, 128, block_m=128, dtype=torch.float16, two_level=True), 128),
]
MATRIX = [
    (Case(m, n, k, g, 1, block_n, block_m, dtype, bias, two_level=True), block_k)
    for m, block_n, block_m in ((1, 64, 16), (33, 64, 32), (300, 128, 128))
    for n in (1, 127, 384)
    for g, k in ((32, 96), (32, 512), (64, 320), (128, 640))
    for block_k, dtype, bias in ((64, torch.bfloat16, True), (128, torch.float16, False))
]


def assert_agrees(interpreter: Interpreter, case: Case, descriptors: bool, block_k: int) -> None:
    found = interpreter(int8_cases.compare, case, descriptors, block_k)
    assert found.weights_equal
    assert found.sums_equal
    assert found.output_error <= 1


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("case", "block_k"), CASES, ids=str)
def test_weights_sums_and_outputs_are_the_reference_s(
    interpreter: Interpreter, case: Case, block_k: int, descriptors: bool
) -> None:
    assert_agrees(interpreter, case, descriptors, block_k)


@pytest.mark.full
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("case", "block_k"), MATRIX, ids=str)
def test_the_matrix_agrees_with_the_reference(
    interpreter: Interpreter, case: Case, block_k: int, descriptors: bool
) -> None:
    assert_agrees(interpreter, case, descriptors, block_k)


def test_what_does_not_fit_is_refused(interpreter: Interpreter) -> None:
    for change, message in (
        ("small", r"the layer needs a workspace int8 \[32768\], got torch.int8 \[32767\]"),
        ("wide", r"the layer needs a workspace int8 \[32768\], got torch.uint8 \[32768\]"),
        ("groups", "only weights with two-level scales fit int8"),
    ):
        with pytest.raises(ValueError, match=message):
            interpreter(int8_cases.refused, change)


def test_no_tokens_give_no_outputs(interpreter: Interpreter) -> None:
    assert interpreter(int8_cases.no_tokens) == (0, 200)
