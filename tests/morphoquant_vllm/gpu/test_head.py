"""The 8-bit head's kernel in Triton's interpreter against the torch reference, and what its launch refuses."""

from __future__ import annotations

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import head
from tests.morphoquant_vllm.gpu import head_cases
from tests.morphoquant_vllm.gpu.interpreter import Interpreter

pytest.importorskip("triton", reason="needs triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "outputs", "channels"), [(1, 100, 256), (16, 64, 128), (17, 130, 272), (70, 65, 144)]
)
def test_logits_lie_within_the_bound(
    tokens: int, outputs: int, channels: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    assert interpreter(head_cases.error, tokens, outputs, channels, dtype) <= 1


def test_no_token_gives_no_logit() -> None:
    y = head.head(torch.empty((0, 32)).bfloat16(), torch.zeros((5, 32), dtype=torch.int8), torch.ones(5))
    assert y.shape == (0, 5)


def test_a_loaded_head_is_checked(interpreter: Interpreter) -> None:
    interpreter(head_cases.check, 1.0)
    with pytest.raises(MorphoQuantError, match="lm_head: the 8-bit head of 16 tokens is wrong on this GPU"):
        interpreter(head_cases.check, 1.02)


def test_few_tokens_have_a_tile_of_their_own() -> None:
    assert [head.tile_of(tokens).block_m for tokens in (1, 16, 17, 64, 65, 2048)] == [16, 16, 64, 64, 64, 64]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(4, 64), "takes bfloat16 and float16, not float32"),
        (torch.zeros(4, 40).half(), "K = 40 is not a multiple of 16"),
    ],
)
def test_weights_that_it_does_not_take(weight: torch.Tensor, reason: str) -> None:
    assert reason in str(head.eight_bit_refusal(weight))
    assert head.eight_bit_refusal(torch.zeros(4, 64).bfloat16()) is None


CODES, SCALE = torch.zeros((5, 32), dtype=torch.int8), torch.ones(5)


@pytest.mark.parametrize(
    ("x", "codes", "scale", "message"),
    [
        (torch.ones(2, 32), CODES, SCALE, "x must be bfloat16 or float16"),
        (torch.ones(2, 16).half(), CODES, SCALE, r"codes must be int8 \[N, 16\]"),
        (torch.ones(2, 32).half(), CODES.int(), SCALE, "codes must be int8"),
        (torch.ones(2, 32).half(), CODES, SCALE[:4], r"scale must be float32 \[5\]"),
        (torch.ones(2, 32).half(), CODES.T.contiguous().T, SCALE, "must be contiguous"),
    ],
)
def test_wrong_tensors(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head.head(x, codes, scale)
