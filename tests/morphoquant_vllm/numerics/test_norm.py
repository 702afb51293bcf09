"""The norm is vLLM's own definition, to the bit."""

import pytest
import torch

from morphoquant_vllm.numerics import norm


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_is_that_of_vllm_s_intermediate_representation(
    dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    from vllm import ir

    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(2, 9, 896, generator=generator) * 3).to(dtype)
    weight = (torch.rand(896, generator=generator) + 0.5).to(weight_dtype or dtype)
    plain, added = (getattr(ir.ops, name).impls["native"].impl_fn for name in ("rms_norm", "fused_add_rms_norm"))
    assert torch.equal(norm.rms_norm(x, weight, 1e-5), plain(x, weight, 1e-5))
    for found, expected in zip(
        norm.add_rms_norm(x, residual, weight, 1e-5), added(x, residual, weight, 1e-5), strict=True
    ):
        assert torch.equal(found, expected)
    assert not torch.equal(norm.rms_norm(x, weight, 1e-5), plain(x, weight, 1.0))
