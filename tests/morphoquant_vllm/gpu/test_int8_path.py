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


def test_a_path_that_is_wrong_is_found_while_loading(interpreter: Interpreter) -> None:
    assert interpreter(int8_cases.self_check, "") == ""
    wrong_weight = interpreter(int8_cases.self_check, "unpack")
    assert "with 0.00074 % of its weights wrong" in wrong_weight
    wrong_output = interpreter(int8_cases.self_check, "int8_matmul")
    assert "the int8 path, tile 64x32" in wrong_output and "with 0 % of its weights wrong" in wrong_output
    assert "MORPHOQUANT_TILES" in wrong_output


def test_a_descriptor_over_an_address_is_encoded_as_one_over_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own code, with only the driver's call replaced: what it is given, and what the kernel gets."""
    nvidia = pytest.importorskip("triton.backends.nvidia.driver", reason="needs triton")
    int8_path = pytest.importorskip("morphoquant_vllm.gpu.int8_path", reason="needs triton")
    calls: list[tuple[object, ...]] = []

    class Driver:
        class utils:
            @staticmethod
            def fill_tma_descriptor_tiled(*arguments: object) -> str:
                calls.append(tuple(list(item) if isinstance(item, tuple) else item for item in arguments))
                return "map"

    monkeypatch.setattr(nvidia.triton.runtime.driver, "_active", Driver)
    codes = torch.zeros((5, 96), dtype=torch.int8)
    metadata = {"swizzle": 3, "elem_size": 1, "elem_type": 0, "block_size": [128, 128], "fp4_padded": False}
    known = int8_path.operand(codes, (128, 128), True)
    descriptors = known, int8_path.AddressDescriptor(codes.data_ptr(), 5, 96)
    signature = {0: "tensordesc<i8[128, 128]>", 1: "i32"}
    passed: list[list[object]] = []
    launcher = nvidia.wrap_handle_tensordesc(lambda *arguments: passed.append(list(arguments)), signature, [metadata])
    for descriptor in descriptors:
        launcher(*range(11), (descriptor, 7))
    assert calls[0] == calls[1] and calls[0][0] == codes.data_ptr()
    assert passed[0] == passed[1]
    assert tuple(passed[0][-1]) == ("map", 5, 96, 96, 1, 7)
