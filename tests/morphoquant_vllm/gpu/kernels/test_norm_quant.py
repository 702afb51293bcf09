"""RMSNorm inside the quantizer, interpreted: what it may round the other way, and that nothing else differs."""

import pytest
import torch

from tests.morphoquant_vllm.gpu import norm_cases
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.interpreter import Interpreter

# One token and several a program, channels that fill no power of two, all types, blocks of massive intervals.
SAMPLE = [
    Case(1, 32, 64, 32),
    Case(7, 32, 1088, 32, dtype=torch.float16, blocks=2),
    Case(17, 32, 3584, 128),
    Case(16, 32, 384, 128, blocks=3),
    Case(5, 32, 96, 32, in_order=True),
    Case(129, 32, 96, 32, dtype=torch.float16, in_order=True),
    Case(129, 32, 128, 32, blocks=2),
]
MATRIX = [
    Case(tokens, 32, in_features, 32, dtype=dtype, in_order=in_order)
    for tokens in (1, 2, 9, 64, 131)
    for in_features in (64, 96, 896, 3584, 5120)
    for dtype in (torch.bfloat16, torch.float16)
    for in_order in (False, True)
]
# Two sums of squares in float32 lie a few units of 2^-24 apart: so few values are that near a tie of 16 bit.
OTHER_SHARE = {torch.bfloat16: 1e-4, torch.float16: 2e-4}


def assert_agrees(interpreter: Interpreter, case: Case, add: bool) -> None:
    found = interpreter(norm_cases.compare, case, add)
    assert found.residual_equal
    assert found.other_values <= max(1, OTHER_SHARE[case.dtype] * found.values)
    assert found.farthest <= 1
    assert found.codes_equal and found.rows_equal
    assert found.same_without_normed
    assert found.codes_of_equal_tokens
    assert found.massive > 0 and (case.tokens == 1 or found.massive < case.tokens)
    assert found.escapes > 0 or found.values < 1000


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_codes_differ_only_where_the_norm_does(interpreter: Interpreter, case: Case, add: bool) -> None:
    assert_agrees(interpreter, case, add)


@pytest.mark.full
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_the_matrix(interpreter: Interpreter, case: Case, add: bool) -> None:
    assert_agrees(interpreter, case, add)


@pytest.mark.parametrize("first", [0, 3])
def test_rows_of_the_input_may_lie_apart(interpreter: Interpreter, first: int) -> None:
    """And anywhere: those that begin on no 16 bytes are copied."""
    assert interpreter(norm_cases.strided_input_agrees, Case(5, 32, 64, 32), first)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("case", "architecture"), [(Case(1, 144, 576, 64), "sm_90"), (Case(5, 70, 96, 32, two_level=True), "sm_89")]
)
def test_the_fused_op_gives_the_bits_of_the_two_steps(
    interpreter: Interpreter, case: Case, architecture: str, add: bool
) -> None:
    assert interpreter(norm_cases.fused, case, architecture, add) == (True, True)


def test_tokens_that_are_too_wide_are_normed_by_torch(interpreter: Interpreter) -> None:
    """The kernel's norm of these tokens is torch's, to the bit: the case above would show another."""
    assert interpreter(norm_cases.fused, Case(3, 70, 96, 32), "sm_89", True, 64) == (True, True)


def test_a_kernel_that_is_wrong_is_found_while_loading(interpreter: Interpreter) -> None:
    sound, wrong = interpreter(norm_cases.self_check)
    assert sound == [""] * 3
    assert all("the kernel that norms and quantizes" in problem for problem in wrong)
