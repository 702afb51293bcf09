"""The stand-in for a served layer computes the outputs of numerics.linear."""

import pytest
import torch
from torch import Tensor

from calibration.blocks.served_linear import ServedLinear, TokenRows
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import is_massive
from morphoquant_vllm.numerics.linear import linear
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, N = 128, 24


def stored(parallel: str, scheme: str = "group") -> tuple[dict[str, Tensor], QuantizationSpec]:
    layer = LayerSpec(K, N, 32, parallel, "layer", scale_scheme=scheme)
    spec = QuantizationSpec(layers={"layer": layer}, tensor_parallel=4)
    full = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    return random_group([full], layer, spec, torch.tensor(2))[0], spec


@pytest.mark.parametrize(("parallel", "scheme"), [("column", "group"), ("row", "group"), ("row", "two_level")])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
def test_it_computes_the_definition(
    parallel: str, scheme: str, with_bias: bool, dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("the kernels do not run here")
    tensors, spec = stored(parallel, scheme)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3)).to(dtype) if with_bias else None
    x = torch.randn(60, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    massive = is_massive(x, *(tensors[f"massive_{name}"] for name in ("channel", "low", "high")))
    assert 5 < int(massive.sum()) < 55
    # Tokens of known and of unknown modality.
    modality = (torch.arange(60) % 3).int() if with_bias else None
    served = ServedLinear(tensors, bias, TokenRows(spec.any_row, modality), torch.device("cpu"))
    assert (served.prepared is not None) == kernels
    rows = torch.full((60,), spec.any_row, dtype=torch.int32) if modality is None else modality
    expected = linear(x, rows, weight_of(tensors), activation_of(tensors), bias)
    y = served(x)
    assert y.dtype is dtype
    # float32 sums of 128 products instead of float64 ones, at outputs of about 100; then one rounding to dtype.
    tolerance = torch.finfo(dtype).eps * expected.float().abs() + 128 * 2.0**-24 * 1000
    assert bool(((y.float() - expected.float()).abs() <= tolerance).all())


def test_leading_dimensions_are_kept() -> None:
    tensors, spec = stored("column")
    served = ServedLinear(tensors, None, TokenRows(spec.any_row), torch.device("cpu"))
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(5))
    assert served(x).shape == (2, 3, N)
    assert torch.equal(served(x).flatten(0, 1), served(x.flatten(0, 1)))
