"""The kernels of the head, 8-bit and bfloat16, against the torch reference."""

import pytest
import torch

from morphoquant_vllm import ops
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import head as cpu_head
from morphoquant_vllm.cpu.build import Kernels
from tests.morphoquant_vllm.cpu.head_cases import bfloat16_case, compare_bfloat16_heads, compare_heads, head_case


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


@pytest.fixture
def bfloat16(library: Kernels) -> Kernels:
    """Kernels with the bfloat16 head; skips if the processor has none."""
    if library.head_bfloat16 is None:
        pytest.skip(f"no bfloat16 head: {library.instructions}, or this processor has no AVX512-BF16")
    return library


def test_bfloat16_outputs_are_within_the_bound_and_the_same_in_every_batch(bfloat16: Kernels, threads: int) -> None:
    compare_bfloat16_heads(bfloat16)


def test_bfloat16_strided_tokens(bfloat16: Kernels) -> None:
    x, weight = bfloat16_case(40, 64, 5)
    expected = cpu_head.head_bfloat16(x, weight, bfloat16)
    wide = torch.cat((x, x + 1), 1)
    assert torch.equal(cpu_head.head_bfloat16(wide[:, :64], weight, bfloat16), expected)
    assert torch.equal(cpu_head.head_bfloat16(x.T.contiguous().T, weight, bfloat16), expected)


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
    library = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none")
    with pytest.raises(ValueError, match="must"):
        cpu_head.head(*change(*head_case(12, 64, 3, torch.float32)), library)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, weight: (x.float(), weight),
        lambda x, weight: (x[0], weight),
        lambda x, weight: (x[:, :32], weight),
        lambda x, weight: (x.to("meta"), weight),
        lambda x, weight: (x, weight.half()),
        lambda x, weight: (x, weight.T.contiguous().T),
        lambda x, weight: (x[:, :48].contiguous(), weight[:, :48].contiguous()),
    ],
)
def test_wrong_bfloat16_inputs_raise_before_native_code_runs(change) -> None:
    library = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none", _native_code)
    with pytest.raises(ValueError, match="must"):
        cpu_head.head_bfloat16(*change(*bfloat16_case(12, 64, 3)), library)


def test_a_processor_without_the_instruction_is_named() -> None:
    library = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none")
    with pytest.raises(RuntimeError, match="AVX512-BF16"):
        cpu_head.head_bfloat16(*bfloat16_case(12, 64, 3), library)


def test_amx_and_what_the_kernel_does_not_take_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none", _native_code)
    monkeypatch.setattr(cpu_head, "kernels", lambda: library)
    monkeypatch.setattr(cpu_head, "cpu_flags", lambda: frozenset(("avx512_bf16",)))
    weight = bfloat16_case(12, 64, 1)[1]
    assert cpu_head.serves_bfloat16(weight)
    assert not cpu_head.serves_bfloat16(weight.half())
    assert not cpu_head.serves_bfloat16(weight[:, :48])
    assert not cpu_head.serves_bfloat16(weight.to("meta"))
    monkeypatch.setattr(cpu_head, "cpu_flags", lambda: frozenset(("avx512_bf16", "amx_bf16")))
    assert not cpu_head.serves_bfloat16(weight)
    monkeypatch.setattr(cpu_head, "kernels", lambda: None)
    monkeypatch.setattr(cpu_head, "cpu_flags", lambda: frozenset(("avx512_bf16",)))
    assert not cpu_head.serves_bfloat16(weight)


def test_no_tokens_need_no_native_code() -> None:
    library = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none", _native_code)
    for dtype in (torch.float32, torch.bfloat16):
        x, codes, scale = head_case(12, 64, 3, dtype)
        assert cpu_head.head(x[:0], codes, scale, library).shape == (0, 12)
    x, weight = bfloat16_case(12, 64, 3)
    assert cpu_head.head_bfloat16(x[:0], weight, library).shape == (0, 12)


def test_the_op_is_well_formed() -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    torch.library.opcheck(
        ops.head.default, head_case(12, 64, 3, torch.bfloat16), test_utils=("test_schema", "test_faketensor")
    )
    if cpu_head.serves_bfloat16(bfloat16_case(12, 64, 3)[1]):
        torch.library.opcheck(
            ops.head_bfloat16.default, bfloat16_case(12, 64, 3), test_utils=("test_schema", "test_faketensor")
        )
