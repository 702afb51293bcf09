"""The 8-bit head's kernel against the torch reference."""

import pytest
import torch

from morphoquant_vllm import cpu, cpu_head, ops
from morphoquant_vllm.cpu_build import Kernels
from tests.morphoquant_vllm.head_cases import compare_heads, head_case


def test_outputs_are_within_the_bound_and_the_same_in_every_batch(library: Kernels, threads: int) -> None:
    compare_heads(library)


def test_strided_tokens(library: Kernels) -> None:
    x, codes, scale = head_case(12, 64, 5, torch.bfloat16)
    expected = cpu_head.head(x, codes, scale, library)
    wide = torch.cat((x, x + 1), 1)
    assert torch.equal(cpu_head.head(wide[:, :64], codes, scale, library), expected)
    transposed = x.T.contiguous().T
    assert transposed.stride(1) != 1
    assert torch.equal(cpu_head.head(transposed, codes, scale, library), expected)


def _native_code(call: bytes) -> int:
    raise AssertionError("native code was called")


@pytest.mark.parametrize(
    "change",
    [
        lambda x, codes, scale: (x.double(), codes, scale),
        lambda x, codes, scale: (x[0], codes, scale),
        lambda x, codes, scale: (x[:, :48], codes, scale),
        lambda x, codes, scale: (x.to("meta"), codes, scale),
        lambda x, codes, scale: (x, codes.float(), scale),
        lambda x, codes, scale: (x, codes[:-1], scale),
        lambda x, codes, scale: (x, codes.T.contiguous().T, scale),
        lambda x, codes, scale: (x, codes, scale.double()),
        lambda x, codes, scale: (x, codes, scale[:, None]),
        lambda x, codes, scale: (x[:, :40].contiguous(), codes[:, :40].contiguous(), scale),
    ],
)
def test_wrong_inputs_raise_before_native_code_runs(change) -> None:
    library = Kernels(_native_code, _native_code, _native_code, 0, "none")
    with pytest.raises(ValueError, match="must"):
        cpu_head.head(*change(*head_case(12, 64, 3, torch.float32)), library)


def test_no_tokens_need_no_native_code() -> None:
    library = Kernels(_native_code, _native_code, _native_code, 0, "none")
    x, codes, scale = head_case(12, 64, 3, torch.float32)
    assert cpu_head.head(x[:0], codes, scale, library).shape == (0, 12)


def test_the_op_is_well_formed() -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    torch.library.opcheck(
        ops.head.default, head_case(12, 64, 3, torch.bfloat16), test_utils=("test_schema", "test_faketensor")
    )
