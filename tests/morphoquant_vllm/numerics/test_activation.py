"""The served activation quantizer against a numpy re-derivation of its definition, and the grid it runs on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morphoquant_vllm.numerics import reference
from morphoquant_vllm.numerics.activation import (
    GUARD_CODES,
    ActivationRecord,
    act_quant,
    activation_record,
    dequantize,
    escapes,
    inverse_steps,
    served_grid,
)

# One set of one interval that holds no token.
NEVER_MASSIVE = {
    "massive_channel": torch.zeros(1, 1, dtype=torch.int32),
    "massive_low": torch.ones(1, 1),
    "massive_high": -torch.ones(1, 1),
}


def random_record(in_features: int, rows: int, seed: int = 0) -> ActivationRecord:
    generator = torch.Generator().manual_seed(seed)
    return activation_record(
        step=torch.rand(in_features, generator=generator) * 0.3 + 0.01,
        channel_order=torch.randperm(in_features, generator=generator).int(),
        mask=torch.rand(rows, in_features, generator=generator) < 0.3,
        centre=torch.randn(rows, in_features, generator=generator),
        gain=torch.rand(rows, generator=generator) + 0.5,
        **NEVER_MASSIVE,
    )


def unit_record(mask: list[bool]) -> ActivationRecord:
    """Step, gain 1 and centre 0: the code of x is x, rounded and clamped."""
    width = len(mask)
    return activation_record(
        torch.ones(width),
        torch.arange(width).int(),
        torch.tensor([mask]),
        torch.zeros(1, width),
        torch.ones(1),
        **NEVER_MASSIVE,
    )


def served_codes(x: Tensor, modality: Tensor, record: ActivationRecord) -> np.ndarray:
    """Section 2 of the algorithm, value by value in numpy float32."""
    values, rows = x.float().numpy(), modality.tolist()
    codes = np.empty(values.shape, dtype=np.int8)
    for token, row in enumerate(rows):
        for position, channel in enumerate(record.channel_order.tolist()):
            low, high = (-128, 127) if bool(record.mask[row, position]) else (-8, 7)
            centre, inverse = np.float32(record.centre[row, position]), np.float32(record.inverse[row, position])
            scaled = np.float32(np.float32(values[token, channel] - centre) * inverse)
            codes[token, position] = 0 if np.isnan(scaled) else int(min(max(np.rint(scaled), low), high))
    return codes


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 7),
    rows=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_codes_follow_the_definition(tokens: int, rows: int, seed: int, dtype: torch.dtype) -> None:
    record = random_record(16, rows, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = (torch.randn(tokens, 16, generator=generator) * 4).to(dtype)
    odd = torch.rand(tokens, 16, generator=generator)
    x[odd < 0.05], x[odd > 0.95], x[(odd > 0.5) & (odd < 0.55)] = torch.inf, -torch.inf, torch.nan
    modality = torch.randint(rows, (tokens,), generator=generator, dtype=torch.int32)
    codes = act_quant(x, modality, record)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), served_codes(x, modality, record))


def test_values_that_are_not_finite() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf, -torch.inf]])
    record = unit_record([False] * 3 + [True] * 3)
    assert act_quant(x, torch.zeros(1, dtype=torch.int32), record).tolist() == [[0, 7, -8, 0, 127, -128]]


def test_ties_round_half_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert act_quant(x, torch.zeros(1, dtype=torch.int32), unit_record([False] * 6)).tolist() == [[0, 2, 2, 0, -2, -2]]


def test_mask_widens_the_limits_on_the_same_grid() -> None:
    x = torch.tensor([[6.0, 50.0, -200.0, 6.0, 50.0, -200.0]])
    codes = act_quant(x, torch.zeros(1, dtype=torch.int32), unit_record([True] * 3 + [False] * 3))
    assert codes.tolist() == [[6, 50, -128, 6, 7, -8]]
    assert escapes(codes).tolist() == [[False, True, True, False, False, False]]


def test_every_row_is_honoured_token_by_token() -> None:
    record = random_record(32, rows=3)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(5)) * 5
    modality = torch.tensor([0, 1, 2, 2, 1, 0, 1, 0, 2], dtype=torch.int32)
    together = act_quant(x, modality, record)
    for token, row in enumerate(modality.tolist()):
        alone = ActivationRecord(*(field[row : row + 1] for field in record[:4]), *record[4:])
        assert torch.equal(
            act_quant(x[token : token + 1], torch.zeros(1, dtype=torch.int32), alone)[0], together[token]
        )
    swapped = act_quant(x, (modality + 1) % 3, record)
    assert (together != swapped).any(dim=1).all(), "another row must give other codes for every token"


def test_one_row_and_equal_rows_give_the_same_codes() -> None:
    record = random_record(32, rows=1)
    repeated = ActivationRecord(*(torch.cat([field] * 4) for field in record[:4]), *record[4:])
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 3
    one = act_quant(x, torch.zeros(6, dtype=torch.int32), record)
    assert torch.equal(one, act_quant(x, torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.int32), repeated))


def test_record_gathers_natural_order_into_permuted_order() -> None:
    step, order = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 1], dtype=torch.int32)
    mask, centre = torch.tensor([[True, False, False]]), torch.tensor([[10.0, 20.0, 30.0]])
    record = activation_record(step, order, mask, centre, torch.tensor([0.5]), **NEVER_MASSIVE)
    assert record.inverse.tolist() == [[0.5, 2.0, 1.0]]
    assert record.centre.tolist() == [[30.0, 10.0, 20.0]]
    assert record.mask.tolist() == [[False, True, False]]
    x = torch.tensor([[11.0, 22.0, 32.0]])
    codes = act_quant(x, torch.zeros(1, dtype=torch.int32), record)
    assert codes.tolist() == [[1, 2, 2]]
    assert dequantize(codes, torch.zeros(1, dtype=torch.int32), record).tolist() == [[32.0, 11.0, 22.0]]


def test_inverse_steps_are_float32_per_row() -> None:
    inverse = inverse_steps(torch.tensor([0.1, 3.0]), torch.tensor([1.0, 0.7]))
    expected = [[np.float32(1) / (np.float32(s) * np.float32(g)) for s in (0.1, 3.0)] for g in (1.0, 0.7)]
    assert inverse.dtype == torch.float32
    assert np.array_equal(inverse.numpy(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize(("shape", "rows"), [((2, 15), 2), ((2, 2, 16), 2), ((2, 16), 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...], rows: int) -> None:
    with pytest.raises(ValueError, match="act_quant needs"):
        act_quant(torch.zeros(shape), torch.zeros(rows, dtype=torch.int32), random_record(16, 2))


# --- the grid


def grid_and_record(x: Tensor, mask: Tensor, ratio: float = 1.0, gain: float = 1.0) -> tuple[object, ActivationRecord]:
    """The grid of the channels of x [M, K] after a search that chose `ratio`, and a record of one row."""
    minimum, maximum = x.amin(0), x.amax(0)
    low, high = reference.base_range(minimum, maximum, mask)
    grid = served_grid(ratio * low, ratio * high, minimum, maximum, mask, gain)
    order = torch.arange(x.shape[1]).int()
    record = activation_record(grid.step, order, mask[None], grid.centre[None], torch.tensor([gain]), **NEVER_MASSIVE)
    return grid, record


@pytest.mark.parametrize("masked", [False, True])
def test_dead_and_one_sided_channels_get_finite_positive_steps(masked: bool) -> None:
    # dead; constant; constant far away; edge_lo = 0; tiny; ordinary
    minimum = torch.tensor([0.0, 0.25, -1e4, 0.0, -1e-30, -1.0])
    maximum = torch.tensor([0.0, 0.25, -1e4, 7.0, 1e-30, 1.0])
    grid, record = grid_and_record(torch.stack((minimum, maximum)), torch.full((6,), masked))
    for field in (grid.step, grid.centre, grid.guard_raise, record.inverse):
        assert field.isfinite().all()
    assert (grid.step > 0).all()
    assert (record.inverse > 0).all()
    assert (grid.guard_raise >= 1).all()
    rows = torch.zeros(2, dtype=torch.int32)
    served = dequantize(act_quant(torch.stack((minimum, maximum)), rows, record), rows, record)
    # A channel that never moved is served by its centre: to a float32 rounding of 1e4 and of 8 steps of 1e-8/15.
    assert (served[:, :3] - minimum[:3]).abs().max() <= 1e-3


def test_a_layer_whose_channels_are_all_dead() -> None:
    grid, record = grid_and_record(torch.zeros(3, 4), torch.tensor([True, False, True, False]))
    assert (grid.step == 1).all()
    assert act_quant(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int32), record).abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.6, 0.8, 1.0]), gain=st.sampled_from([0.5, 1.0, 3.0]))
def test_nothing_seen_in_calibration_saturates_on_masked_channels(seed: int, ratio: float, gain: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 24, generator=generator) * torch.logspace(-3, 3, 24)
    x[0] *= 1000  # one token with massive values
    x[:, ::5] = x[:, ::5].abs() + 2  # one-sided channels
    mask = torch.rand(24, generator=generator) < 0.5
    _, record = grid_and_record(x, mask, ratio, gain)
    codes = act_quant(x, torch.zeros(50, dtype=torch.int32), record)
    # The farthest value sits at GUARD_CODES exactly; float32 noise may round it to the next code.
    assert codes[:, mask].int().abs().max().item() <= GUARD_CODES + 1 if mask.any() else True
    assert codes[:, ~mask].int().min() >= -8
    assert codes[:, ~mask].int().max() <= 7


def test_guard_reports_how_far_it_raised_the_step() -> None:
    x = torch.tensor([[-1.0, -1.0], [1.0, 900.0]])
    grid, _ = grid_and_record(x, torch.tensor([False, True]))
    assert grid.guard_raise[0] == 1
    # The step of the range [-1, 1] is 2/15; the guard needs 900/120.
    assert grid.guard_raise[1].item() == pytest.approx(7.5 / (2 / 15), rel=1e-6)
    assert grid.step[1].item() == pytest.approx(7.5, rel=1e-6)


def test_one_sided_centre_is_the_reference_zero_point() -> None:
    low, high = torch.tensor([10.0, -13.0]), torch.tensor([13.0, -10.0])
    grid = served_grid(low, high, low, high, torch.zeros(2, dtype=torch.bool))
    inverse = reference.inverse_step(low, high)
    assert torch.allclose(grid.centre * inverse, reference.zero_point(low, inverse), rtol=1e-6)  # float32 rounding


def test_escape_mode_equals_exact_mode_but_for_rounding() -> None:
    """On the grid, and on bypassed values, the two forms differ by rounding alone: half a step, one code at ties."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 16, generator=generator)
    x[::50, :6] *= 4
    mask = torch.arange(16) < 6
    minimum, maximum = x.amin(0), x.amax(0)
    minimum[mask] = -1.0  # skewed: the nearer edge sets the range, the farther values escape
    low, high = reference.base_range(minimum, maximum, mask)
    grid = served_grid(low, high, x.amin(0), x.amax(0), mask)
    assert (grid.guard_raise == 1).all(), "the guard must stay out of this comparison"
    order = torch.arange(16).int()
    record = activation_record(grid.step, order, mask[None], grid.centre[None], torch.ones(1), **NEVER_MASSIVE)
    rows = torch.zeros(400, dtype=torch.int32)
    codes = act_quant(x, rows, record)
    served = dequantize(codes, rows, record)
    exact = reference.exact_quantize(x, low, high, mask)
    bypassed = mask & (x.abs() > reference.escape_limit(low, high))
    assert escapes(codes).any()
    assert bypassed.sum() > 10
    # The reference's two-sided grid is [-7.5, 7.5] shifted to integers by float noise: a tie may go either way.
    half = grid.step * 0.5 * (1 + 1e-5)
    assert ((served - exact).abs() <= half)[bypassed].all()
    assert ((served - exact).abs() <= grid.step * (1 + 1e-5))[~bypassed].all()
