"""The norm of bound layers with Triton's launcher replaced: it launches what Triton's own launch does."""

from collections.abc import Iterator

import pytest
import torch

from morphoquant_vllm import ops
from morphoquant_vllm.gpu import device, layout, norm_launch
from morphoquant_vllm.gpu.bound_kernels import ALIGNMENT
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS
from morphoquant_vllm.gpu.tools.no_device import no_device, noted
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.test_bound import ALLOCATED, kernel_of, made, names, profile

EPSILON = 1e-6
# Unread where there is no residual.
WRITTEN = ALLOCATED | {"new_residual_ptr"}


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from morphoquant_vllm.gpu import selfcheck

    monkeypatch.setattr(selfcheck, "check", lambda *_: None)
    monkeypatch.setattr(device, "profile_of", lambda _: profile())
    monkeypatch.setenv("MORPHOQUANT_FUSION", "1")
    with no_device(90):
        yield


@pytest.mark.parametrize("in_order", [False, True])
def test_it_launches_what_triton_s_own_launch_does(in_order: bool) -> None:
    """Kernel by kernel the same binary, grid and arguments, and no kernel of the JIT's."""
    it = made(Case(WHOLE_TOKENS, 200, 640, 64, in_order=in_order), bias=True)
    weight = torch.ones(640, dtype=torch.bfloat16)
    records = layout.GpuWeight(*it.weight), layout.GpuActivation(*it.activation)
    residuals = torch.zeros_like(it.x)
    for count in (1, 17, WHOLE_TOKENS):
        x = it.x[:count]
        for residual in (None, residuals[:count]):
            with noted() as expected:
                norm_launch.norm_linear(x, residual, weight, EPSILON, it.modality, *records, it.bias, profile())
            arguments = (weight, EPSILON, it.modality, it.handle, it.bias)
            with noted() as found:
                if residual is None:
                    y, total = ops.rms_norm_linear(x, *arguments), x
                else:
                    y, total = ops.add_rms_norm_linear(x, residual, *arguments)
            assert [kernel_of(item) for item in found][:2] == ["quantize_normed", "int4_gemm"]
            assert [item.source.hash() for item in found] == [item.source.hash() for item in expected]
            assert [(item.grid, item.options) for item in found] == [(item.grid, item.options) for item in expected]
            for one, other in zip(found, expected, strict=True):
                differing = {name for name, value in names(other).items() if names(one)[name] != value}
                assert differing <= WRITTEN, kernel_of(one)
            first, product = names(found[0]), names(found[1])
            assert (first["codes_ptr"], first["rows_ptr"]) == (product["codes_ptr"], product["rows_ptr"])
            assert first["new_residual_ptr"] == total.data_ptr()
            assert names(found[-1])["out_ptr"] == y.data_ptr()


def test_what_the_bound_kernel_does_not_fit_goes_another_way() -> None:
    """A weight that begins on no 16 bytes is copied; one in float32 is applied by torch, before the plain quantizer."""
    it = made(Case(5, 200, 640, 64))
    shifted = torch.ones(641, dtype=torch.bfloat16)[1:]
    assert shifted.data_ptr() % ALIGNMENT
    with noted() as found:
        ops.rms_norm_linear(it.x, shifted, EPSILON, it.modality, it.handle, None)
    assert kernel_of(found[0]) == "quantize_normed" and names(found[0])["norm_weight_ptr"] % ALIGNMENT == 0
    with noted() as found:
        ops.rms_norm_linear(it.x, torch.ones(640), EPSILON, it.modality, it.handle, None)
    assert kernel_of(found[0]) == "quantize_activation"


def test_it_is_not_compiled_without_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHOQUANT_FUSION", "0")
    with noted() as found:
        made(Case(5, 200, 640, 64))
    assert found and all(kernel_of(item) != "quantize_normed" for item in found)
