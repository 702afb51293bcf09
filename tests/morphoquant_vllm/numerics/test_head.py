"""The 8-bit head in torch: the effect of quantization on a logit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant_vllm.numerics.head import LARGEST_CODE, head, quantize_outputs, rounding_bound


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_logit_moves_by_no_more_than_the_bound(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(9, 40, generator=generator) * torch.rand(9, 1, generator=generator)).to(dtype)
    x = torch.randn(5, 40, generator=generator)
    codes, scale = quantize_outputs(weight)
    moved = (head(x.double(), codes, scale) - x.double() @ weight.double().T).abs()
    assert bool((moved <= rounding_bound(x, scale)).all())


def test_the_largest_weight_of_a_row_keeps_its_value_and_zeros_stay_zero() -> None:
    weight = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0], [1e-30, 0.0, -5e-31]])
    codes, scale = quantize_outputs(weight)
    assert codes.tolist() == [[32, -LARGEST_CODE, 64], [0, 0, 0], [LARGEST_CODE, 0, -64]]
    assert scale[1] == 0
    torch.testing.assert_close(codes[0, 1] * scale[0], torch.tensor(-2.0))


def test_rows_are_quantized_by_themselves_whatever_their_number() -> None:
    weight = torch.randn(4100, 16, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_outputs(weight)
    for row in (0, 4095, 4096, 4099):
        own = quantize_outputs(weight[row : row + 1])
        assert torch.equal(own[0][0], codes[row]) and own[1][0] == scale[row]


def test_a_weight_that_is_not_finite_shows_in_the_scale() -> None:
    weight = torch.ones(2, 16)
    weight[1, 3] = torch.nan
    assert quantize_outputs(weight)[1].isfinite().tolist() == [True, False]
