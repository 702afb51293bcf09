"""Callers of the backend beside vLLM, interpreted: a model in transformers, and calibration's served stream."""

import pytest
import torch

from tests.morphoquant_vllm.gpu import users
from tests.morphoquant_vllm.gpu.interpreter import Interpreter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_run_on_the_kernels_of_the_gpu(interpreter: Interpreter, dtype: torch.dtype) -> None:
    for user in (users.served_linear, users.loaded_linear):
        backend, error = interpreter(user, dtype)
        assert backend == "triton"
        assert error <= 1


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.bfloat16, True), (torch.float32, False)])
def test_calibrations_experts_run_on_the_kernels_that_take_their_dtype(
    interpreter: Interpreter, dtype: torch.dtype, kernels: bool
) -> None:
    assert interpreter(users.served_experts, dtype) == (kernels, True)


def test_float32_which_the_kernels_do_not_take_runs_elsewhere(interpreter: Interpreter) -> None:
    backend, error = interpreter(users.loaded_linear, torch.float32)
    assert backend == "reference" and error == 0
    # Calibration multiplies in float32 there, with dequantized weights.
    backend, error = interpreter(users.served_linear, torch.float32)
    assert backend == "" and error <= 4
