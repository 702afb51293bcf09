"""The model card: fields of the source's card, the figures, and text that cannot break a table."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from calibration.output.card import model_card, read_front_matter
from morphoquant_vllm.format.layers import ExpertsSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from tests.checkpoints import layer_specs

SPEC = QuantizationSpec(layers=layer_specs(1))
REPORT = {
    "settings": {"group_size": 32, "ignore": ["a|b", "<script>"]},
    "data": {"samples": 3, "tokens": {"text": 100, "image": 20}},
    "escape_rate": 0.05,
    "layers": {name: {"output_error": 0.1 + 0.01 * index} for index, name in enumerate(SPEC.layers)},
    "versions": {"torch": "2.13"},
}


def card(carried: dict[str, str | list[str]]) -> str:
    return model_card(carried, SPEC, REPORT, "LlamaForCausalLM", 500, 1000)


def front_matter(text: str) -> dict[str, object]:
    _, front, _ = text.split("---\n", 2)
    content = yaml.safe_load(front)
    assert isinstance(content, dict)
    return content


def test_a_licence_and_a_base_are_carried() -> None:
    text = card({"license": "apache-2.0", "base_model": "owner/name"})
    front = front_matter(text)
    assert (front["license"], front["base_model"], front["base_model_relation"]) == (
        "apache-2.0",
        "owner/name",
        "quantized",
    )
    assert front["library_name"] == "vllm" and "w4a4" in front["tags"]  # type: ignore[operator]
    assert "holds: `apache-2.0`" in text


def test_an_unknown_licence_is_said() -> None:
    text = card({})
    assert not {"license", "base_model", "base_model_relation"} & set(front_matter(text))
    assert "names no licence" in text


def test_the_figures_of_the_report_stand_in_the_card() -> None:
    text = card({})
    for line in ("| text | 100 |", "| image | 20 |", "3 samples.", "| escape rate | 5.00% |", "4.20 bits on average"):
        assert line in text
    # The median of seven errors, and the largest first.
    assert "median | 0.1300 |" in text
    assert text.index("| 0.1600 |") < text.index("| 0.1500 |") < text.index("| 0.1400 |")
    assert "0.50 of the source's" in text
    assert "vllm serve DIR" in text


def test_eight_bit_weights_are_said() -> None:
    wide = QuantizationSpec(
        layers={name: replace(layer, weight_bits=8) if "attn" in name else layer for name, layer in SPEC.layers.items()}
    )
    assert "4 linears have 8-bit weights" in model_card({}, wide, REPORT, "LlamaForCausalLM", 500, 1000)
    assert "8-bit" not in card({})


def test_text_of_others_stays_inside_its_cell() -> None:
    text = card({"license": "mit\n# Heading | `code`"})
    assert "a\\|b, &lt;script>" in text
    assert "\n# Heading" not in text.split("---\n", 2)[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Name", {"license": "mit"}),
        ("---\nlanguage: [en, de]\nbase_model: o/n\n---\n", {"language": ["en", "de"], "base_model": "o/n"}),
        ("---\nlicense: {a: 1}\nlanguage: [[1]]\nbase_model: []\n---\n", {}),
        ("---\nlicense: null\nlanguage: [en, ~]\nbase_model:\n---\n", {}),
        # SafeLoader raises ValueError for each of these values, and takes the language "no" for false.
        ("---\nlicense: mit\ndate: 2024-13-45\nrevision: 0x_\n---\n", {"license": "mit"}),
        ("---\nlanguage: [en, no]\nlicense_name: !odd 1\n---\n", {"language": ["en", "no"], "license_name": "1"}),
        ("---\nlicense: mit\n", {}),
        ("# Name\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
        ("---\njust words\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matters_as_people_write_them(tmp_path: Path, text: str, expected: dict[str, object]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path) == expected


def test_a_source_without_a_readable_card(tmp_path: Path) -> None:
    assert read_front_matter(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_front_matter(tmp_path) == {}


def test_experts_are_counted_and_their_errors_are_among_the_worst() -> None:
    figures = {"few": 2, "none": 1, "gate_up_error": [0.1, None], "down_error": [0.9, None], "tokens": [4, 0]}
    spec = QuantizationSpec(layers=SPEC.layers, experts={"m.experts": ExpertsSpec(2, 64, 32, 32)})
    text = model_card({}, spec, REPORT | {"experts": {"m.experts": figures}}, "Qwen3MoeForCausalLM", 500, 1000)
    assert "| quantized experts | 2 |" in text
    assert "| experts with few drawn tokens, and with none | 2, 1 |" in text
    assert "| largest: `m.experts.0.down_proj` | 0.9000 |" in text
