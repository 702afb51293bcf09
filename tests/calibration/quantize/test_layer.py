"""One input's tensors and its record, from a sample of tokens: rows, steps and escapes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calibration.quantize.layer_report import escape_warning
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import tensor_specs
from morphoquant_vllm.format.values import check_values, unequal_input_tensors
from morphoquant_vllm.numerics import activation
from tests.calibration.inputs import (
    ANY,
    AUDIO,
    MASSIVE,
    PLAIN,
    TEXT,
    K,
    activations,
    make_spec,
    matrix,
    quantize,
    relative,
    serve,
    with_massive,
)
from tests.records import activation_of


@pytest.mark.parametrize("levels", [0, 16])
def test_tensors_are_those_of_the_format_and_shards_share_their_input(levels: int) -> None:
    x, modality, outlying = with_massive()
    shards = {"m.q": matrix(48), "m.k": matrix(16, 4)}
    spec = make_spec(shards, scheme="two_level" if levels else "group")
    quantized = quantize(x, modality, shards, outlying=outlying, spec=spec, scale_levels=levels)
    for name, layer in quantized.items():
        wanted = tensor_specs(spec.layers[name], len(spec.rows), spec.tensor_parallel)
        assert set(layer.tensors) == set(wanted)
        for tensor, want in wanted.items():
            assert (layer.tensors[tensor].dtype, tuple(layer.tensors[tensor].shape)) == (want.dtype, want.shape)
        check_values(name, layer.tensors, spec.any_row, parallel="column", blocks=1)
    assert unequal_input_tensors(quantized["m.q"].tensors, quantized["m.k"].tensors) == []


@pytest.mark.parametrize(
    "settings",
    [{}, PLAIN, {"grid": "reference"}, {"massive_row": False}, {"escape_budget": 0.0}, {"scale_levels": 16}],
)
def test_the_record_describes_what_is_served(settings: dict[str, object]) -> None:
    x, modality, outlying = with_massive()
    weight = matrix()
    # Without balance every token counts the same, so that the weighted error is the plain one.
    layer = quantize(x, modality, {"m.q": weight}, balance=0.0, outlying=outlying, **settings)["m.q"]
    codes, y = serve(x, layer.tensors, modality)
    assert layer.figures.output_error == pytest.approx(relative(y, x @ weight.T), rel=1e-3)  # float32 sums
    # A wrong order, packing or centre costs about 1; without a massive row ordinary tokens are nearly lost beside it.
    assert 0 < layer.figures.output_error < 0.3
    escaped = activation.escapes(codes).float()
    rates = layer.figures.escape_rate
    assert rates["text"] == pytest.approx(float(escaped[modality == TEXT].mean()))
    assert rates["audio"] == pytest.approx(float(escaped[modality == AUDIO].mean()))
    assert rates["all"] == pytest.approx(float(escaped.mean()))
    found = settings.get("massive_row", True)
    assert list(rates) == ["text", "audio", *(["massive"] if found else []), "all"]
    if found:
        assert rates["massive"] == pytest.approx(float(escaped[outlying].mean()))
    assert layer.figures.massive_tokens == (int(outlying.sum()) if found else 0)


# --- massive tokens


@pytest.mark.parametrize("settings", [{}, PLAIN, {"grid": "reference"}, {"escape_budget": 0.0}])
def test_the_massive_row_serves_massive_tokens_and_all_others_better(settings: dict[str, object]) -> None:
    x, modality, outlying = with_massive()
    weight = matrix()
    expected = x @ weight.T
    errors = {}
    for row in (True, False):
        layer = quantize(x, modality, {"m.q": weight}, outlying=outlying, massive_row=row, **settings)["m.q"]
        _, y = serve(x, layer.tensors)
        errors[row] = relative(y[outlying], expected[outlying]), relative(y[~outlying], expected[~outlying])
    # Without escapes most of what massive tokens lose is what their grid cuts off, in any row.
    factor = 0.7 if settings.get("escape_budget") == 0 else 0.5
    assert errors[True][0] < factor * errors[False][0], "massive tokens"
    assert errors[True][1] < errors[False][1], "ordinary tokens: massive ones no longer set their steps"


def test_louder_massive_tokens_do_not_spoil_the_fit_for_others() -> None:
    weight, errors = matrix(), []
    for loud in (1, 20, 60):
        x, modality, outlying = with_massive()
        # Unlike each other, so that a fit could lower their error at the cost of others.
        x[outlying] *= torch.linspace(loud, 3 * loud, int(outlying.sum()))[:, None]
        layer = quantize(x, modality, {"m.q": weight}, outlying=outlying)["m.q"]
        errors.append(relative(serve(x, layer.tensors)[1][~outlying], x[~outlying] @ weight.T))
    # Their codes hardly change. If their energy counted, the error would nearly double.
    assert errors == pytest.approx([errors[0]] * 3, rel=0.01)


def test_massive_tokens_that_were_not_seen_are_served_as_well() -> None:
    x, modality, outlying = with_massive()
    weight = matrix()
    layer = quantize(x, modality, {"m.q": weight}, outlying=outlying)["m.q"]
    fresh, _, massive = with_massive(seed=50)
    record = activation_of(layer.tensors)
    rows = activation.token_rows(fresh, torch.full(fresh.shape[:1], ANY, dtype=torch.int32), record)
    assert torch.equal(rows == MASSIVE, massive)
    _, y = serve(fresh, layer.tensors)
    # Values that differ by a hundredth, on 8-bit codes.
    assert relative(y[massive], fresh[massive] @ weight.T) < 0.02


def test_without_massive_tokens_the_row_is_that_of_any_and_no_token_takes_it() -> None:
    x, modality = activations()
    layer = quantize(x, modality, {"m.q": matrix()})["m.q"]
    for name in ("centre", "gain"):
        assert torch.equal(layer.tensors[name][MASSIVE], layer.tensors[name][ANY])
    assert torch.equal(layer.tensors["absorbed_bias"][:, MASSIVE], layer.tensors["absorbed_bias"][:, ANY])
    record = activation_of(layer.tensors)
    held = activation.is_massive(x * 100, record.massive_channel, record.massive_low, record.massive_high)
    assert not bool(held.any())
    assert layer.figures.massive_tokens == 0
    assert "massive" not in layer.figures.escape_rate


def test_outlying_tokens_that_look_like_the_others_stay_ordinary() -> None:
    x, modality = activations()
    outlying = torch.arange(x.shape[0]) % 25 == 0
    x[outlying] = x[1::25][: int(outlying.sum())]
    layer = quantize(x, modality, {"m.q": matrix()}, outlying=outlying)["m.q"]
    assert layer.figures.massive_tokens == 0
    codes, _ = serve(x, layer.tensors)
    assert int(codes.int().abs().max()) <= activation.GUARD_CODES + 1, "their values still bound the steps"


# --- rows of modalities


def two_modalities() -> tuple[Tensor, Tensor, Tensor]:
    """Text, and half as many quiet audio tokens that lie elsewhere; every 25th token is massive."""
    x, modality, outlying = with_massive()
    audio = torch.arange(x.shape[0]) % 3 == 1
    modality = torch.where(audio, AUDIO, TEXT).int()
    quiet = audio & ~outlying
    x[quiet] = 0.2 * x[quiet] + torch.linspace(-1, 1, K)
    return x, modality, outlying


def test_a_modality_is_served_better_by_a_row_of_its_own() -> None:
    x, modality, outlying = two_modalities()
    weight = matrix()
    expected = x @ weight.T
    errors = {}
    for own in (True, False):
        layer = quantize(x, modality, {"m.q": weight}, outlying=outlying, modality_rows=own)["m.q"]
        check_values("m.q", layer.tensors, ANY, parallel="column", blocks=1)
        codes, y = serve(x, layer.tensors, modality)
        part = (modality == AUDIO) & ~outlying
        errors[own] = relative(y[part], expected[part])
        # Ties: the search divides by the step, serving multiplies by its inverse; gains are sought on half the tokens.
        assert float(activation.escapes(codes[~outlying]).float().mean()) <= 0.05
        # float32 sums
        assert layer.figures.output_error == pytest.approx(weighted_error(y, expected, modality), rel=1e-3)
    assert errors[True] < 0.7 * errors[False]


def weighted_error(y: Tensor, expected: Tensor, modality: Tensor) -> float:
    """Relative error with every modality weighing the same."""
    weight = sum((modality == row) / (modality == row).sum() for row in modality.unique())
    parts = ((value.square().sum(1) * weight).sum() for value in (y - expected, expected))
    error, power = parts
    return float((error / power).sqrt())


def test_a_layer_record_says_which_modalities_have_rows_and_why() -> None:
    x, modality, outlying = two_modalities()
    rows = quantize(x, modality, {"m.q": matrix()}, outlying=outlying)["m.q"].figures.modality_rows
    assert list(rows) == ["text", "audio"]
    assert rows["audio"].own and rows["audio"].gain < 1
    assert "held-out" in rows["audio"].reason
    assert quantize(x, modality, {"m.q": matrix()}, modality_rows=False)["m.q"].figures.modality_rows == {}
    alone = quantize(x, torch.zeros_like(modality), {"m.q": matrix()}, outlying=outlying)["m.q"]
    assert alone.figures.modality_rows == {}, "one modality is any modality"


def test_a_modality_without_a_row_shares_that_of_any_token() -> None:
    x, modality, outlying = two_modalities()
    tensors = quantize(x, modality, {"m.q": matrix()}, outlying=outlying, row_margin=0.99)["m.q"].tensors
    for row in (TEXT, AUDIO):
        assert torch.equal(tensors["centre"][row], tensors["centre"][ANY])
        assert torch.equal(tensors["absorbed_bias"][:, row], tensors["absorbed_bias"][:, ANY])
    assert tensors["gain"][:5].tolist() == [1.0] * 5


def test_tokens_of_unknown_modality_are_served_right_in_the_mean() -> None:
    x, modality, outlying = two_modalities()
    weight = matrix()
    layer = quantize(x, modality, {"m.q": weight}, balance=0.0, outlying=outlying)["m.q"]
    assert any(row.own for row in layer.figures.modality_rows.values())
    _, y = serve(x, layer.tensors)
    ordinary = ~outlying
    # float32 sums and constants at outputs of up to 2000.
    assert torch.allclose(y[ordinary].mean(0), (x[ordinary] @ weight.T).mean(0), atol=2e-3)
    assert relative(y[ordinary], x[ordinary] @ weight.T) < 0.3


# --- steps and budget


@pytest.mark.parametrize("budget", [0.005, 0.04, 0.2])
def test_ordinary_tokens_keep_the_budget_and_nothing_seen_saturates(budget: float) -> None:
    x, modality, outlying = with_massive()
    layer = quantize(x, modality, {"m.q": matrix()}, balance=0.0, outlying=outlying, escape_budget=budget)["m.q"]
    codes, _ = serve(x, layer.tensors)
    # The search divides by the step, serving multiplies by its inverse: codes at a tie may go the other way.
    assert float(activation.escapes(codes[~outlying]).float().mean()) <= budget + 1e-4
    assert layer.figures.masked_channels == dict.fromkeys(("text", "image", "video", "audio", "any", "massive"), K)
    # The farthest value sits at GUARD_CODES exactly; float32 noise may round it to the next code.
    assert int(codes.int().abs().max()) <= activation.GUARD_CODES + 1


def test_without_a_budget_only_massive_tokens_leave_four_bits() -> None:
    x, modality, outlying = with_massive()
    layer = quantize(x, modality, {"m.q": matrix()}, outlying=outlying, escape_budget=0.0)["m.q"]
    codes, _ = serve(x, layer.tensors)
    assert not bool(activation.escapes(codes[~outlying]).any())
    assert layer.figures.masked_channels["any"] == 0
    assert layer.figures.masked_channels["massive"] == K
    assert layer.figures.escape_rate["text"] > 0, "massive tokens are text, too"


def test_the_reference_grid_masks_the_outliers_of_every_modality() -> None:
    x, modality = activations()
    layer = quantize(x, modality, {"m.q": matrix()}, grid="reference")["m.q"]
    assert layer.tensors["modality_mask"][ANY].nonzero().flatten().tolist() == [5, 9]
    codes, _ = serve(x, layer.tensors)
    mask = layer.tensors["modality_mask"][ANY][layer.tensors["channel_order"].long()]
    assert bool(activation.escapes(codes[:, mask]).any())
    assert not bool(activation.escapes(codes[:, ~mask]).any())


def test_massive_tokens_that_are_not_set_apart_are_no_modality_of_the_reference_grid() -> None:
    """Enough of them would have a mask of their own, of channels on which no modality has a tail."""
    x, modality = activations()
    outlying = torch.zeros(x.shape[0], dtype=torch.bool)
    outlying[1:160:4] = True
    # A tail among the outlying tokens alone, small beside the text's on channel 5.
    x[outlying] *= 0.1
    x[1:160:16, 22] = 9.0
    shards = {"m.q": matrix()}
    layer = quantize(x, modality, shards, outlying=outlying, grid="reference", massive_row=False)["m.q"]
    assert layer.tensors["modality_mask"][ANY].nonzero().flatten().tolist() == [5, 9]
    # They are served by the same steps, so that nothing of theirs may saturate either.
    x[1, 5] = 1000.0
    layer = quantize(x, modality, shards, outlying=outlying, grid="reference", massive_row=False)["m.q"]
    codes, _ = serve(x, layer.tensors)
    assert int(codes[1].abs().max()) <= activation.GUARD_CODES


@pytest.mark.parametrize("pattern", ["*.q", "m.fused"])
def test_full_mask_patterns_mask_every_channel(pattern: str) -> None:
    x, modality = activations()
    layer = quantize(x, modality, {"m.q": matrix()}, grid="reference", full_mask=(pattern,))["m.q"]
    assert bool(layer.tensors["modality_mask"].all())


@pytest.mark.parametrize("grid", ["budget", "reference"])
def test_a_dead_channel_and_a_constant_input_stay_finite(grid: str) -> None:
    modality = torch.zeros(50, dtype=torch.int32)
    x, _ = activations(50)
    x[:, 3] = 0
    layer = quantize(x, modality, {"m.q": matrix()}, grid=grid)["m.q"]
    check_values("m.q", layer.tensors, ANY, parallel="column", blocks=1)
    for constant in (torch.zeros(50, K), torch.randn(1, K).repeat(50, 1)):
        layer = quantize(constant, modality, {"m.q": matrix()}, grid=grid)["m.q"]
        check_values("m.q", layer.tensors, ANY, parallel="column", blocks=1)
        # Served by the centre and the bias alone, but for float32.
        assert layer.figures.output_error < 1e-5


def test_an_escape_rate_far_above_the_budget_is_a_warning_with_the_layer() -> None:
    # Every second token is of another kind, and the search looks at every second token.
    generator = torch.Generator().manual_seed(0)
    x, modality = 0.1 * torch.randn(8192, K, generator=generator), torch.zeros(8192, dtype=torch.int32)
    x[1::2] *= 40
    figures = quantize(x, modality, {"m.q": matrix()})["m.q"].figures
    drawn = {"text": 8192}
    warning = escape_warning("m.qkv", figures, Recipe(), drawn)
    assert warning is not None and warning.startswith(
        "m.qkv: 40% of the codes of text tokens escape, far above escape_b"
    )
    for settings in ({"grid": "reference"}, {"escape_budget": 0.0}, {"escape_budget": 0.2}):
        assert escape_warning("m.qkv", figures, Recipe(**settings), drawn) is None  # type: ignore[arg-type]
    # A tenth of the tokens is massive; all others keep the budget.
    within = replace(figures, escape_rate={"text": 0.13, "massive": 0.9, "all": 0.13}, massive_tokens=819)
    assert escape_warning("m.qkv", within, Recipe(), drawn) is None
    assert escape_warning("m.qkv", replace(within, massive_tokens=0), Recipe(), drawn) is not None
