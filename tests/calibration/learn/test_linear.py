"""The linear that learns: it starts as the definition, and its gradients pass the rounding."""

import math

import pytest
import torch
from torch import Tensor

from calibration.blocks.served_linear import TokenRows
from calibration.learn.changes import no_changes
from calibration.learn.linear import LearningInput, LearningLinear, RoundInput
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import ActivationRecord, is_massive
from morphoquant_vllm.numerics.linear import linear
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, N, TOKENS = 128, 24, 60
SIZE = 2.0


def made(scheme: str, bias: Tensor | None = None) -> tuple[LearningLinear, dict[str, Tensor], QuantizationSpec]:
    layer = LayerSpec(K, N, 32, "row", "layer", scale_scheme=scheme)
    spec = QuantizationSpec(layers={"layer": layer}, tensor_parallel=4)
    full = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    tensors = random_group([full], layer, spec, torch.tensor(2))[0]
    changes = no_changes(spec.layers, {"layer": SIZE}, torch.device("cpu")).of("layer", layer)
    given = LearningInput(tensors, changes.step, TokenRows(spec.any_row), torch.device("cpu"))
    return LearningLinear(tensors, bias, given, changes), tensors, spec


def inputs() -> Tensor:
    return torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("scheme", ["group", "two_level"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_before_it_learns_it_computes_the_definition(scheme: str, with_bias: bool) -> None:
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3)) if with_bias else None
    learning, tensors, spec = made(scheme, bias)
    rows = torch.full((TOKENS,), spec.any_row, dtype=torch.int32)
    expected = linear(inputs(), rows, weight_of(tensors), activation_of(tensors), bias)
    # float32 sums of 128 products instead of float64 ones, at outputs of about 100.
    torch.testing.assert_close(learning(inputs()).detach(), expected, rtol=1e-5, atol=128 * 2.0**-24 * 1000)
    assert learning(inputs()[None, :6]).shape == (1, 6, N)


def test_scales_of_groups_do_not_learn() -> None:
    assert made("group")[0].changes.scale is None
    assert made("two_level")[0].changes.scale is not None


def test_the_gradients_of_scale_and_constant_are_exact_and_massive_tokens_keep_their_constant() -> None:
    learning, tensors, _ = made("two_level")
    changes = learning.changes
    assert changes.scale is not None
    massive = is_massive(inputs(), *(tensors[f"massive_{name}"] for name in ("channel", "low", "high")))
    assert 5 < int(massive.sum()) < 55
    before = learning(inputs())
    before.sum().backward()
    assert changes.constant.grad is not None and changes.scale.grad is not None
    torch.testing.assert_close(changes.constant.grad, torch.full((N,), SIZE * int((~massive).sum())))
    with torch.no_grad():
        changes.constant.add_(1)
    after = learning(inputs())
    assert torch.equal(after[massive], before[massive])
    torch.testing.assert_close(after[~massive], before[~massive] + SIZE)
    with torch.no_grad():
        changes.constant.sub_(1)
        changes.scale.add_(math.log(2))
    doubled = (learning(inputs()) - before).detach()
    # The product doubles, so it rises by itself; its derivative by the logarithm is the product.
    torch.testing.assert_close(doubled.sum(0), changes.scale.grad, rtol=1e-4, atol=1e-2)


def record(mask: bool, order: list[int]) -> ActivationRecord:
    """Two channels, in this order, with the steps 0.5 and 2, centre 1, and one row."""
    return ActivationRecord(
        inverse=torch.tensor([[2.0, 0.5]]),
        centre=torch.ones(1, 2),
        mask=torch.full((1, 2), mask),
        gain=torch.ones(1),
        channel_order=torch.tensor(order, dtype=torch.int32),
        massive_channel=torch.zeros(1, 4, dtype=torch.int32),
        massive_low=torch.full((1, 4), math.inf),
        massive_high=torch.full((1, 4), -math.inf),
    )


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_rounding_passes_the_gradient_and_clamping_does_not(mask: bool, order: list[int]) -> None:
    # Two channels in either order are their own inverse.
    x = torch.tensor([[1.6, 4.0], [6.0, -40.0]])[:, order].requires_grad_()
    change = torch.zeros(2, requires_grad=True)
    codes = RoundInput.apply(x, change, record(mask, order), torch.zeros(2, dtype=torch.int32))
    # (x - centre) / step: 1.2, 1.5, 10 and -20.5; codes beyond 7 and below -8 need the mask.
    expected = [[1.0, 2.0], [10.0, -20.0]] if mask else [[1.0, 2.0], [7.0, -8.0]]
    assert codes.tolist() == expected
    codes.sum().backward()
    inside = float(mask)
    assert x.grad is not None and x.grad[:, order].tolist() == [[2.0, 0.5], [2.0 * inside, 0.5 * inside]]
    # A larger step makes smaller codes: minus the sum of the exact values.
    assert change.grad is not None
    torch.testing.assert_close(change.grad[order], torch.tensor([-1.2 - 10.0 * inside, -1.5 + 20.5 * inside]))


def test_linears_that_share_an_input_share_its_codes() -> None:
    learning, _, _ = made("two_level")
    x = inputs()
    first, _ = learning.given.codes(x)
    assert learning.given.codes(x)[0] is first
    assert learning.given.codes(x.clone())[0] is not first
    again, _ = learning.given.codes(x)
    learning.given.forget()
    assert learning.given.codes(x)[0] is not again
