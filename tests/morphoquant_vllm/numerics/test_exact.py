"""Exact mode: escapes bypass the grid, all other values are those of the served form."""

import torch

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, dequantize, escapes
from morphoquant_vllm.numerics.exact import exact_codes, linear_exact
from morphoquant_vllm.numerics.linear import WeightRecord, linear
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, N = 64, 8


def records() -> tuple[ActivationRecord, WeightRecord]:
    layer = LayerSpec(K, N, 32, "column", "m.fused")
    spec = QuantizationSpec(layers={"m.fused": layer})
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    (tensors,) = random_group([weight], layer, spec, torch.tensor(2))
    return activation_of(tensors), weight_of(tensors)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = 8 * torch.randn(50, K, generator=torch.Generator().manual_seed(3))
    return x, torch.arange(50, dtype=torch.int32) % 5


def test_only_escapes_differ_from_the_served_codes_and_they_stand_for_the_value_itself() -> None:
    record, _ = records()
    x, rows = inputs()
    served, exact = act_quant(x, rows, record), exact_codes(x, rows, record)
    escaped = escapes(served)
    assert 0.001 < float(escaped.float().mean()) < 0.5
    assert torch.equal(exact[~escaped], served.double()[~escaped])
    # Saturated ones too: a value of 8-bit range and more is still itself.
    gathered = x[:, record.channel_order.long()]
    torch.testing.assert_close(dequantize(exact, rows, record)[escaped], gathered[escaped], rtol=1e-5, atol=1e-5)


def test_the_layer_without_escapes_is_the_served_layer() -> None:
    record, weight = records()
    x, modality = inputs()
    assert torch.equal(
        linear_exact(x, modality, weight, record._replace(mask=record.mask & False)),
        linear(x, modality, weight, record._replace(mask=record.mask & False)),
    )
    assert not torch.equal(linear_exact(x, modality, weight, record), linear(x, modality, weight, record))


def test_values_that_are_no_numbers_are_served_as_ever() -> None:
    record, _ = records()
    x = torch.full((3, K), torch.nan)
    x[1], x[2] = torch.inf, -torch.inf
    rows = torch.zeros(3, dtype=torch.int32)
    assert torch.equal(exact_codes(x, rows, record), act_quant(x, rows, record).double())
