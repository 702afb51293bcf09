"""Weights as they are stored and as they are served."""

import pytest
import torch
from torch import Tensor

from calibration.processes import ONE
from calibration.quantize.moments import Moments
from calibration.quantize.served_weights import round_weights
from calibration.settings.recipe import Recipe
from morphoquant_vllm.numerics import weights
from tests.calibration.inputs import K, make_spec, matrix

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
