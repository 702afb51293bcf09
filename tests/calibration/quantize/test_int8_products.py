"""Products of codes: whole numbers, whatever computes them."""

import pytest
import torch
from torch import Tensor

from calibration.quantize import int8_products as integers
from calibration.quantize.int8_products import has_exact_products, products


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (700, 33, 70), (4096, 64, 130)])
@pytest.mark.parametrize("exact", [True, False])
def test_products_are_those_of_whole_numbers(
    shape: tuple[int, int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(integers, "has_exact_products", lambda: False)
    tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    # The largest there are: float32 cannot hold every sum of 4096 of their products, and rounds it.
    left, right = (
        torch.where(torch.rand(tokens, count, generator=generator) < 0.5, -128, 127).to(torch.int8)
        for count in (rows, columns)
    )
    # As moments takes channels out of codes.
    found = products(torch.cat((left, left), 1)[:, rows:], right)
    expected = left.T.long() @ right.long()
    if found.dtype is torch.int32:
        assert torch.equal(found.long(), expected)
    else:
        assert torch.allclose(found.double(), expected.double(), rtol=1e-6, atol=1e-6 * tokens * 2**14)


def test_a_processor_that_cuts_sums_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """x86 without VNNI: pairs of products with left + 128, in 16 bits."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        pairs = torch.einsum(
            "ikp,kpj->ikj", (left.long() + 128).unflatten(1, (-1, 2)), right.long().unflatten(0, (-1, 2))
        )
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * right.long().sum(0)).int()

    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("another kind of processor")
    monkeypatch.setattr(torch, "_int_mm", product)
    assert not has_exact_products.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: left.int() @ right.int())
    assert has_exact_products.__wrapped__()
