import pytest
import torch

from benchmarks.accuracy.baselines.gptq import gptq_int4, group_order, hessian_loss, hessian_of
from benchmarks.accuracy.baselines.weights import NF4_VALUES, nf4, rtn_int4
from morphoquant_vllm.errors import MorphoQuantError


def _weight(rows: int = 24, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _correlated(tokens: int = 512, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(tokens, columns, generator=generator) @ (mixing + 0.3)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rtn_has_sixteen_values_per_group_and_clipping_helps(group_size: int) -> None:
    weight = _weight()
    weight[0, 0] = 8.0
    rounded = rtn_int4(weight, group_size)
    assert max(row.unique().numel() for row in rounded.view(-1, group_size)) <= 16
    peak = weight.view(-1, group_size).abs().amax(1, keepdim=True)
    scale = (peak / 7).bfloat16().float()
    plain = (torch.round(weight.view(-1, group_size) / scale).clamp(-8, 7) * scale).view_as(weight)
    assert (rounded - weight).square().sum() < (plain - weight).square().sum()


def test_smaller_groups_round_better() -> None:
    errors = [float((rtn_int4(_weight(), size) - _weight()).square().sum()) for size in (32, 64, 128)]
    assert errors == sorted(errors)


def test_rtn_refuses_a_group_that_does_not_divide() -> None:
    with pytest.raises(MorphoQuantError, match="K = 128 is not divisible by group size 48"):
        rtn_int4(_weight(), 48)


def test_zero_weights_stay_zero() -> None:
    zeros = torch.zeros(2, 64)
    assert torch.equal(rtn_int4(zeros, 64), zeros)
    assert torch.equal(nf4(zeros), zeros)


@pytest.mark.parametrize("group_size", [32, 64])
def test_gptq_loses_less_of_the_output_than_rtn(group_size: int) -> None:
    weight, hessian = _weight(), hessian_of([_correlated()])
    loss = hessian_loss(weight, gptq_int4(weight, hessian, group_size), hessian)
    # On inputs as correlated as these GPTQ wins by far more than a tenth.
    assert loss < 0.9 * hessian_loss(weight, rtn_int4(weight, group_size), hessian)


def test_gptq_rounds_the_groups_and_columns_that_matter_first() -> None:
    order = group_order(torch.tensor([1.0, 2.0, 9.0, 0.0, 5.0, 5.0]), 2)
    assert order.tolist() == [2, 3, 4, 5, 1, 0]


def test_gptq_on_uncorrelated_inputs_is_rtn() -> None:
    weight = _weight()
    assert torch.equal(gptq_int4(weight, torch.eye(128), 32), rtn_int4(weight, 32))


def test_gptq_stands_dead_channels() -> None:
    x = _correlated()
    x[:, 5] = 0.0
    rounded = gptq_int4(_weight(), hessian_of([x]), 64)
    assert bool(rounded.isfinite().all())
    assert bool((rounded[:, 5] == 0).all())


def test_hessian_is_the_mean_over_all_tokens() -> None:
    x = _correlated()
    # Sums in another order: a few float32 roundings.
    torch.testing.assert_close(hessian_of([x[:100], x[100:]]), hessian_of([x]), rtol=1e-4, atol=1e-4)


def test_nf4_table() -> None:
    assert len(NF4_VALUES) == 16
    assert list(NF4_VALUES) == sorted(NF4_VALUES)
    assert NF4_VALUES[0] == -1.0 and NF4_VALUES[-1] == 1.0 and 0.0 in NF4_VALUES


def test_nf4_takes_the_nearest_value_and_is_idempotent() -> None:
    weight = _weight()
    rounded = nf4(weight)
    # Twice the same table and the same maxima: nothing moves.
    assert torch.equal(nf4(rounded), rounded)
    blocks = weight.view(-1, 64)
    values = torch.tensor(NF4_VALUES) * blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[:, :, None] - values[:, None, :]).abs().amin(-1)
    torch.testing.assert_close((rounded.view(-1, 64) - blocks).abs(), nearest)
