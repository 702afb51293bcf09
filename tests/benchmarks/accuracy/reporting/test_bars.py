"""The targets of the served method."""

import pytest

from benchmarks.accuracy.reporting import bars
from morphoquant_vllm.errors import MorphoQuantError

FORMAT = {"format": bars.FORMAT}


def test_a_result_of_older_code_is_refused_in_one_line() -> None:
    for older in ({}, {"format": bars.FORMAT - 1}):
        with pytest.raises(MorphoQuantError, match=r"language: the result has format .*; measure again, or name other"):
            bars.check({"benchmark": "language", "methods": {}, **older})


def test_bars_of_the_language_benchmarks() -> None:
    def method(perplexity: float, over_ours: float, activations: dict | None = None) -> dict:
        row = {"perplexity": perplexity, "activations": activations}
        against = [{"ratio": ratio, "error": 0.01} for ratio in (perplexity / 10, over_ours)]
        return {
            "texts": {"play": row},
            "against_16bit": against[0],
            "against_ours": against[1],
            "activations": activations,
        }

    escapes = {"rate": 0.044, "worst_rate": 0.21, "worst_layer": "a"}
    methods = {
        "served": method(11.3, 1.0, escapes),
        "w4a4-hadamard-gptq": method(15.0, 1.33),
        "w4a16-auto-round-light-g32": method(10.9, 0.965),
        "served-group": method(11.3, 0.999),
        "w4a16-gptq-g32": method(11.2, 0.99),
    }
    assert [(asked, met) for asked, met, _ in bars.check({**FORMAT, "benchmark": "language", "methods": methods})] == [
        ("together: perplexity at most 1.12 times 16 bit's", False),
        ("together: perplexity at most 0.78 times w4a4-hadamard-gptq's", True),
        ("together: perplexity at most 1.02 times w4a16-auto-round-light-g32's", False),
        ("together: perplexity at most 1.002 times served-group's", True),
        ("play: perplexity below w4a16-gptq-g32's", False),
        ("play: escapes at most 4.5%", True),
        ("play: escapes at most 20% in any layer", False),
        ("together: escapes at most 4.5%", True),
        ("together: escapes at most 20% in any layer", False),
    ]
    # A model without a goal of its own, and a benchmark in which ours was not measured.
    assert bars.check({**FORMAT, "benchmark": "gemma", "methods": methods})[0][0].endswith("w4a4-hadamard-gptq's")
    assert bars.check({**FORMAT, "benchmark": "language", "methods": {"16bit": methods["served-group"]}}) == []


def test_bars_without_every_text() -> None:
    ours = {"texts": {"play": {"perplexity": None, "activations": None}}, "against_16bit": None, "activations": None}
    group = {"against_ours": None}
    assert bars.check({**FORMAT, "benchmark": "language", "methods": {"served": ours, "served-group": group}}) == []


def test_bars_of_the_omni_benchmark() -> None:
    def method(difference: float, activations: dict | None = None, divergence: float = 0.002) -> dict:
        row = {"accuracy": 0.9, "error": 0.004, "difference": difference, "difference_error": 0.001}
        row["divergence"] = divergence
        return {"kinds": {"image": row, "all": row}, "activations": activations}

    escapes = {"rate": 0.06, "worst_rate": 0.1, "worst_layer": "a"}
    summary = {
        **FORMAT,
        "benchmark": "omni",
        "methods": {
            "served": method(-0.015, escapes),
            "w4a4-static-tensor": method(-0.3),
            "w4a16-gptq-g32": method(-0.001, divergence=0.001),
        },
    }
    assert [(asked, met) for asked, met, _ in bars.check(summary)] == [
        ("image: loses at most 2%", True),
        ("all: loses at most 1%", False),
        ("standard error at most 0.5%", True),
        ("w4a4-static-tensor loses at least 20%", True),
        ("divergence at most w4a16-gptq-g32's", False),
        ("questions: escapes at most 4.5%", False),
        ("questions: escapes at most 20% in any layer", True),
    ]


def test_bars_of_the_mixture_of_experts() -> None:
    def method(divergence: float, interval: list[float]) -> dict:
        against = {"difference": sum(interval) / 2, "error": 0.001, "interval": interval}
        return {"kinds": {"all": {"divergence": divergence}}, "against_ours": against}

    methods = {
        "served": method(0.002, [0, 0]),
        "w4a16-gptq-g64": method(0.001, [-0.004, 0.001]),
        "w4a16-gptq-g32": method(0.003, [-0.005, -0.001]),
    }
    assert [(asked, met) for asked, met, _ in bars.check({**FORMAT, "benchmark": "moe-omni", "methods": methods})] == [
        ("answers not worse than w4a16-gptq-g64's: the interval of ours - w4a16-gptq-g64 reaches 0", True),
        ("divergence at most w4a16-gptq-g64's", False),
        ("answers not worse than w4a16-gptq-g32's: the interval of ours - w4a16-gptq-g32 reaches 0", False),
        ("divergence at most w4a16-gptq-g32's", True),
    ]
    assert bars.check({**FORMAT, "benchmark": "moe-omni", "methods": {"16bit": methods["w4a16-gptq-g64"]}}) == []
