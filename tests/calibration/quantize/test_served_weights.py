"""Weights as they are stored and as they are served."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.processes import ONE, Processes
from calibration.quantize.held_out import HeldMoments
from calibration.quantize.moments import Moments
from calibration.quantize.served_weights import round_weights
from calibration.settings.recipe import Recipe
from morphoquant_vllm.numerics import weights
from tests.calibration.inputs import K, make_spec, matrix
from tests.calibration.joined import in_processes

STEP = torch.linspace(0.5, 2.0, K)


def moments(dead: slice = slice(0, 0), times: int = 1, error: float = 1.0) -> Moments:
    """Of 200 tokens, `times` each, whose values are `error` times what codes say; channels `dead` have codes 0."""
    codes = torch.randint(-8, 8, (200, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    codes[:, dead] = 0
    codes = codes.repeat(times, 1)
    tokens = codes.shape[0]
    found = Moments.zeros(1, matrix())
    even = torch.full((tokens,), 1 / tokens)
    found.add(codes, torch.ones(tokens), error * codes * STEP, torch.zeros(tokens, dtype=torch.int64), even)
    found.add_codes(codes, even)
    found.mirror()
    return found


@pytest.mark.parametrize("levels", [0, 16])
@pytest.mark.parametrize("settings", [{}, {"rounding": "nearest"}, {"rounding": "nearest", "regression": False}])
def test_what_is_stored_is_what_is_served(levels: int, settings: dict[str, object]) -> None:
    recipe = Recipe(scale_levels=levels, **({} if levels else settings))
    layer = make_spec({"m.q": matrix()}, scheme="two_level" if levels else "group").layers["m.q"]
    found = round_weights(matrix(), STEP, moments(), layer, recipe, ONE)
    assert torch.equal(weights.dequantize_weight(*found.stored.values()), found.matrix)
    assert next(iter(found.stored)) == "weight_codes" and len(found.stored) == (3 if levels else 2)
    # 4 bits: steps are folded in, or the error would be that of other weights.
    wanted = matrix() * STEP
    assert float((found.matrix - wanted).norm() / wanted.norm()) < 0.15


def test_more_tokens_weaken_the_pull_to_the_original_weights() -> None:
    layer = make_spec({"m.q": matrix()}).layers["m.q"]
    gaps = []
    for times in (1, 20):
        found = round_weights(matrix(), STEP, moments(times=times, error=1.5), layer, Recipe(scale_levels=0), ONE)
        gaps.append(float((found.matrix - 1.5 * matrix() * STEP).norm()))
    assert gaps[1] < 0.8 * gaps[0]


def test_more_tokens_weaken_the_damping() -> None:
    """The same tokens, but more often: rounding then fits them closer."""
    layer = make_spec({"m.q": matrix()}).layers["m.q"]
    losses = []
    for times in (1, 20):
        found = round_weights(
            matrix(), STEP, moments(times=times), layer, Recipe(scale_levels=0, regression=False), ONE
        )
        gap = found.matrix - matrix() * STEP
        losses.append(float(((gap @ moments().take_centred()[0]) * gap).sum()))
    assert losses[1] < 0.97 * losses[0]


def test_channels_without_codes_count_the_same() -> None:
    recipe = Recipe(rounding="nearest", regression=False)
    layer = make_spec({"m.q": matrix()}).layers["m.q"]
    even = weights.dequantize_weight(*_packed(*weights.quantize_int4(matrix() * STEP, torch.ones(K), layer.group_size)))
    # A whole group, and all: no energy to weigh by.
    for dead in (slice(0, layer.group_size), slice(None)):
        found = round_weights(matrix(), STEP, moments(dead), layer, recipe, ONE).matrix
        assert torch.equal(found[:, dead], even[:, dead])


def _packed(int4: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return weights.pack(int4), scale


def noisy(tokens: int, seed: int, out_features: int = 32) -> Moments:
    """Of tokens whose values differ much from their codes, by noise: a fit to few of them learns the noise."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (tokens, K), generator=generator, dtype=torch.int8)
    values = codes * STEP + 8 * torch.randn(tokens, K, generator=generator)
    found = Moments.zeros(1, matrix(out_features))
    even = torch.full((tokens,), 1 / tokens)
    found.add(codes, torch.ones(tokens), values, torch.zeros(tokens, dtype=torch.int64), even)
    found.add_codes(codes, even)
    found.mirror()
    return found


@pytest.mark.parametrize("levels", [0, 16])
def test_held_out_samples_choose_fits_that_hold_for_new_tokens(levels: int) -> None:
    layer = make_spec({"m.q": matrix()}, scheme="two_level" if levels else "group").layers["m.q"]

    def error(held: Moments | None) -> float:
        # A pull that is too weak for 80 tokens.
        recipe = Recipe(scale_levels=levels, shrinkage=4.0)
        found = round_weights(matrix(), STEP, noisy(80, 2), layer, recipe, ONE, held).matrix
        return float(HeldMoments.of(noisy(2000, 1), slice(None)).error(found))

    exact = float(HeldMoments.of(noisy(2000, 1), slice(None)).error(matrix() * STEP))
    plain, chosen = (error(held) - exact for held in (None, noisy(2000, 1)))
    assert chosen < 0.5 * plain


def test_a_plain_rounding_without_regression_has_nothing_to_choose() -> None:
    layer = make_spec({"m.q": matrix()}).layers["m.q"]
    recipe = Recipe(scale_levels=0, rounding="nearest", regression=False)
    with_held = round_weights(matrix(), STEP, moments(), layer, recipe, ONE, noisy(200, 1)).matrix
    assert torch.equal(with_held, round_weights(matrix(), STEP, moments(), layer, recipe, ONE).matrix)


@pytest.mark.full
def test_two_processes_choose_as_one_does(tmp_path: Path) -> None:
    """The second process has the outputs without noise, which alone would choose the weakest pull."""
    layer = make_spec({"m.q": matrix()}, scheme="two_level").layers["m.q"]

    def with_quiet_half(found: Moments) -> Moments:
        # In truth their weights are half as large again as the 16-bit ones. Means are left out.
        found.code_sum.zero_(), found.value_sum.zero_()
        found.code_aim[:, 16:] = 1.5 * (found.code_code * STEP) @ matrix()[16:].T
        return found

    def made(processes: Processes) -> Tensor:
        fitted, held = with_quiet_half(noisy(80, 2)), with_quiet_half(noisy(2000, 1))
        return round_weights(matrix(), STEP, fitted, layer, Recipe(effort="best"), processes, held).matrix[16:]

    one = made(ONE)
    for found in in_processes(tmp_path, made):
        assert float((found - one).norm() / one.norm()) < 0.01


@pytest.mark.parametrize("levels", [0, 16])
def test_errors_of_outputs_cancel_by_the_metrics_of_the_layers(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.quantize.output_metric.LEAST_RUN", 4)
    layer = make_spec({"m.q": matrix()}, scheme="two_level" if levels else "group").layers["m.q"]
    # The model sees sums of outputs of either layer, above all.
    metrics = [torch.ones(16, 16) + torch.eye(16)] * 2

    def sums(recipe: Recipe, metrics: list[Tensor]) -> Tensor:
        found = round_weights(matrix(), STEP, moments(), layer, recipe, ONE, metrics=metrics)
        assert torch.equal(weights.dequantize_weight(*found.stored.values()), found.matrix)
        return (found.matrix - matrix() * STEP).unflatten(0, (2, 16)).sum(1)

    recipe = Recipe(scale_levels=levels)
    assert float(sums(recipe, metrics).norm()) < 0.8 * float(sums(recipe, []).norm())
    if levels:
        nearest = Recipe(rounding="nearest")
        assert torch.equal(sums(nearest, metrics), sums(nearest, []))
