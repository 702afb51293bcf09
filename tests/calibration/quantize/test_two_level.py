"""Two-level scales for group scales: found if they are exact, near if they are fitted."""

import pytest
import torch

from calibration.quantize.two_level import exact_levels, fitted_levels, nearest, refit
from morphoquant_vllm.numerics.limits import MAX_LEVEL
from morphoquant_vllm.numerics.weights import quantize_int4

OUTPUTS, GROUPS, GROUP_SIZE = 64, 24, 32


def multiples(seed: int = 0) -> torch.Tensor:
    """Scales bfloat16 [OUTPUTS, GROUPS] that are whole multiples, 1 to 16, of a number of four bits per output."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(1, MAX_LEVEL + 1, (OUTPUTS, GROUPS), generator=generator)
    unit = torch.randint(1, 16, (OUTPUTS, 1), generator=generator) * 2.0 ** torch.randint(
        -20, 4, (OUTPUTS, 1), generator=generator
    )
    scale = (level * unit).bfloat16()
    assert torch.equal(scale.double(), level * unit.double()), "bfloat16 holds them"
    return scale


def test_whole_multiples_are_found_to_the_bit() -> None:
    scale = multiples()
    found = exact_levels(scale)
    assert found is not None
    level, unit = found
    assert level.dtype is torch.uint8 and unit.dtype is torch.float32
    assert int(level.min()) >= 1 and int(level.max()) <= MAX_LEVEL
    assert torch.equal(level.double() * unit.double()[:, None], scale.double())
    assert torch.equal(level.float() * unit[:, None], scale.float())


@pytest.mark.parametrize("value", [1.0, 2.0**-133, 3.0 * 2.0**-133, 3.375])
def test_one_scale_for_all_groups(value: float) -> None:
    """The smallest number of bfloat16 is no special case."""
    scale = torch.full((2, GROUPS), value).bfloat16()
    found = exact_levels(scale)
    assert found is not None
    assert torch.equal(found[0].float() * found[1][:, None], scale.float())


@pytest.mark.parametrize("row", [[1.0, 17.0], [1.0, 1.0078125], [16.0, 0.9375], [3.0, 5.0, 16.5]])
def test_what_has_no_exact_levels(row: list[float]) -> None:
    """One row of many is enough."""
    scale = multiples()[:, : len(row)].clone()
    assert exact_levels(scale) is not None
    scale[7] = torch.tensor(row)
    assert exact_levels(scale) is None


def test_fitted_levels_find_what_is_exact() -> None:
    scale = multiples()
    level, unit = fitted_levels(scale, torch.ones(OUTPUTS, GROUPS))
    torch.testing.assert_close(level.float() * unit[:, None], scale.float(), rtol=1e-6, atol=0)


def test_groups_of_more_energy_are_fitted_better() -> None:
    scale = (torch.rand(OUTPUTS, GROUPS, generator=torch.Generator().manual_seed(1)) + 0.2).bfloat16()
    heavy = torch.zeros(OUTPUTS, GROUPS)
    heavy[:, 3] = 1
    level, unit = fitted_levels(scale, heavy)
    error = (level * unit[:, None] / scale.float() - 1).abs().mean(0)
    assert error[3] < 0.2 * error.mean()


def test_a_refit_is_near_and_tells_how_near() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-8, 8, (OUTPUTS, GROUPS * GROUP_SIZE), generator=generator).to(torch.int8)
    scale = (torch.rand(OUTPUTS, GROUPS, generator=generator) + 0.5).bfloat16()
    found, level, unit, error = refit(codes, scale)
    assert found.dtype is torch.int8 and int(found.min()) >= -8 and int(found.max()) <= 7
    assert level.dtype is torch.uint8 and int(level.min()) >= 1 and int(level.max()) <= MAX_LEVEL
    before = codes.unflatten(1, (GROUPS, -1)) * scale.float()[..., None]
    after = found.unflatten(1, (GROUPS, -1)) * (level * unit[:, None])[..., None]
    assert error == pytest.approx(float((after - before).norm() / before.norm()))
    assert 0 < error < 0.03


def test_weights_of_zero_stay_zero() -> None:
    found, _, _, error = refit(torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 2).bfloat16())
    assert error == 0 and not found.any()


def test_nearest_rounds_each_weight_against_the_stored_scales() -> None:
    weight = torch.randn(OUTPUTS, GROUPS * GROUP_SIZE, generator=torch.Generator().manual_seed(3))
    codes, level, unit = nearest(weight, torch.ones(GROUPS * GROUP_SIZE), GROUP_SIZE, 16)
    step = (level.float() * unit[:, None]).repeat_interleave(GROUP_SIZE, 1)
    assert torch.equal(codes.float(), (weight / step).round().clamp(-8, 7))
    free, scale = quantize_int4(weight, torch.ones(GROUPS * GROUP_SIZE), GROUP_SIZE)
    error = [
        float((c.float() * s - weight).square().sum())
        for c, s in ((codes, step), (free, scale.float().repeat_interleave(GROUP_SIZE, 1)))
    ]
    # Levels of about 11 leave a scale 2 % from where it would be; the best scale is flat.
    assert error[1] < error[0] < 1.1 * error[1]
