import pytest

from calibration.output.report import make_report
from calibration.quantize.layer_report import LayerRecord
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.schema import LayerSpec, QuantizationSpec

SPEC = QuantizationSpec(
    layers={
        "q": LayerSpec(32, 64, 32, "column", "qkv"),
        "k": LayerSpec(32, 16, 32, "column", "qkv"),
        "down": LayerSpec(96, 32, 32, "row", "down"),
    },
    tensor_parallel=1,
)


def test_the_overall_rate_counts_codes_and_shared_inputs_once() -> None:
    def record(rate: float) -> LayerRecord:
        return LayerRecord({"text": rate, "all": rate}, 0.1, {"any": 1}, 0, 1.0, 2)

    records = {"q": record(0.4), "k": record(0.4), "down": record(0.0)}
    report = make_report(Recipe(), SPEC, records, samples=3, token_counts={0: 7, 3: 2}, experts={})
    assert report["escape_rate"] == pytest.approx(0.4 * 32 / (32 + 96))
    assert report["data"] == {"samples": 3, "tokens": {"text": 7, "audio": 2}}
    assert report["settings"]["tensor_parallel"] == 1
    assert report["layers"]["q"]["escape_rate"] == {"text": 0.4, "all": 0.4}
    assert report["layers"]["q"]["massive_tokens"] == 2
