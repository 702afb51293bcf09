import pytest

from calibration.output.report import empty_experts, make_report
from calibration.quantize.layer_report import ExpertsFigures, LayerFigures
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import ExpertsSpec, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

SPEC = QuantizationSpec(
    layers={
        "q": LayerSpec(32, 64, 32, "column", "qkv"),
        "k": LayerSpec(32, 16, 32, "column", "qkv"),
        "down": LayerSpec(96, 32, 32, "row", "down"),
    },
    tensor_parallel=1,
)


def test_the_overall_rate_counts_codes_and_shared_inputs_once() -> None:
    layers = {"q": layer_figures(0.4), "k": layer_figures(0.4), "down": layer_figures(0.0)}
    report = make_report(Recipe(), SPEC, layers, samples=3, token_counts={0: 7, 3: 2}, experts={})
    assert report["escape_rate"] == pytest.approx(0.4 * 32 / (32 + 96))
    assert report["data"] == {"samples": 3, "tokens": {"text": 7, "audio": 2}}
    assert report["settings"]["tensor_parallel"] == 1
    assert report["layers"]["q"]["escape_rate"] == {"text": 0.4, "all": 0.4}
    assert report["layers"]["q"]["massive_tokens"] == 2


def layer_figures(rate: float) -> LayerFigures:
    return LayerFigures({"text": rate, "all": rate}, 0.1, {"any": 1}, 0, 1.0, 2)


def experts_figures(tokens: list[int], rates: list[float | None], none: int = 0) -> ExpertsFigures:
    errors = [None if rate is None else 0.1 for rate in rates]
    return ExpertsFigures(tokens, tokens, 0, none, layer_figures(0.2), errors, errors, rates)


def test_codes_of_an_expert_count_for_the_tokens_that_chose_it() -> None:
    spec = QuantizationSpec(layers={}, experts={"m.experts": ExpertsSpec(3, 64, 32, 32)})
    experts = {"m.experts": experts_figures([6, 2, 0], [0.1, 0.5, None], none=1)}
    report = make_report(Recipe(), spec, {}, samples=1, token_counts={0: 4}, experts=experts)
    # Of each token: 64 codes of the input, and 32 of every expert that it chose.
    codes = [(0.2, 64), (0.1, 32 * 6 / 4), (0.5, 32 * 2 / 4)]
    assert report["escape_rate"] == pytest.approx(sum(r * n for r, n in codes) / sum(n for _, n in codes))
    assert report["experts"]["m.experts"]["down_escape_rate"] == [0.1, 0.5, None]


def test_many_experts_without_tokens_are_a_warning() -> None:
    assert empty_experts({}) is None
    assert empty_experts({"a": experts_figures([1] * 19 + [0], [0.1] * 19 + [None], none=1)}) is None
    warning = empty_experts({"a": experts_figures([1] * 18 + [0, 0], [0.1] * 18 + [None] * 2, none=2)})
    assert warning is not None and warning.startswith("2 of 20 experts (10%) were chosen by no drawn token")
