"""The backend `triton` behind the custom ops, interpreted: tiles from the shipped table, warm-up, every M."""

import pytest
import torch

from tests.morphoquant_vllm.gpu import served
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.interpreter import Interpreter


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        (Case(0, 48, 64, 32), "sm_80"),
        (Case(1, 144, 576, 64, bias=True), "sm_80"),
        (Case(17, 100, 256, 32, dtype=torch.float16), "sm_89"),
        (Case(40, 70, 384, 128), "sm_90"),
        (Case(9, 48, 96, 32, blocks=3), "sm_100"),
        (Case(66, 130, 128, 64), "gfx942"),
        (Case(0, 48, 64, 32, two_level=True), "sm_80"),
        (Case(1, 144, 576, 64, bias=True, two_level=True), "sm_90"),
        (Case(70, 100, 256, 32, dtype=torch.float16, blocks=2, two_level=True), "sm_89"),
    ],
    ids=str,
)
def test_ops_agree_with_the_reference(interpreter: Interpreter, case: Case, architecture: str) -> None:
    found = interpreter(served.run, case, architecture)
    assert found.codes_equal
    assert found.output_error <= 1
    assert found.shape == (case.tokens, case.out_features)
    assert found.dtype is case.dtype


@pytest.mark.parametrize("two_level", [False, True])
def test_the_ops_are_well_formed_and_compile(interpreter: Interpreter, two_level: bool) -> None:
    interpreter(served.check_ops, Case(3, 40, 64, 32, two_level=two_level))


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 33, 64, 65, 128, 512])
@pytest.mark.parametrize(("group_size", "two_level"), [(32, False), (64, False), (128, False), (32, True), (128, True)])
def test_every_bucket_of_the_table(
    interpreter: Interpreter, architecture: str, tokens: int, group_size: int, two_level: bool
) -> None:
    in_features = 640 if group_size > 32 else 608
    case = Case(tokens, 200, in_features, group_size, bias=tokens % 2 == 0, two_level=two_level)
    found = interpreter(served.run, case, architecture, 108)
    assert found.codes_equal
    assert found.output_error <= 1


@pytest.mark.parametrize("two_level", [False, True])
def test_a_kernel_that_is_wrong_is_found_while_loading(interpreter: Interpreter, two_level: bool) -> None:
    sound, wrong = interpreter(served.self_check, two_level)
    assert sound == [""] * 10
    assert "is off by" in wrong
    assert "MORPHOQUANT_TILES" in wrong


def test_a_quantizer_that_is_wrong_is_found_while_loading(interpreter: Interpreter) -> None:
    assert "the quantizer of 96 channels gives other codes" in interpreter(served.self_check_of_the_quantizer)
