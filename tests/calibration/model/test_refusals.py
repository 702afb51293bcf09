"""Faults of a model directory that are seen before any work."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from calibration.calibrate import calibrate
from calibration.model.architectures import find_architecture
from calibration.model.refusals import check_config, check_weight_names
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels

# Wrong data would be refused later: these tests see that the model is refused first.
NO_DATA = "no-such-data.jsonl"
LINEAR = "self_attn.q_proj.weight"


def refusal(check: Callable[[], Any]) -> str:
    with pytest.raises(MorphoQuantError) as caught:
        check()
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["LlamaForTokenClassification", "Qwen2Model", "LlamaForQuestionAnswering"],
)
def test_a_model_of_another_head_or_none_is_refused_by_its_name(name: str) -> None:
    text = refusal(lambda: check_config({"model_type": "qwen2", "architectures": [name]}))
    assert text.startswith(f"config.json: {name} is not supported") and "only models that write text" in text


@pytest.mark.parametrize(
    "classes",
    [
        *(["Qwen2ForCausalLM"], ["Qwen2_5_VLForConditionalGeneration"], ["Qwen2_5OmniModel"]),
        *(["Qwen2_5OmniThinkerForConditionalGeneration"], [], None),
        *(["Qwen2ForSequenceClassification"], ["Qwen2ForRewardModel"], ["Qwen2ForProcessRewardModel"]),
    ],
)
def test_models_that_write_or_score_text_pass(classes: list[str] | None) -> None:
    check_config({"model_type": "qwen2", "architectures": classes})


@pytest.mark.parametrize("empty", [{}, [], ""])
def test_an_empty_quantization_config_is_a_leftover_to_remove(empty: object) -> None:
    assert "quantization_config is empty" in refusal(lambda: check_config({"quantization_config": empty}))
    text = refusal(lambda: check_config({"thinker_config": {"text_config": {"quantization_config": empty}}}))
    assert text.startswith("config.json: thinker_config.text_config.quantization_config is empty")
    check_config({"quantization_config": None})


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("path", ["is_causal", "text_config.is_causal", "thinker_config.text_config.is_causal"])
def test_attention_to_later_tokens_is_refused_in_a_decoder(path: str, value: bool | None) -> None:
    """vLLM's Qwen2 and Llama then serve it, other models do not."""
    config: Any = value
    for key in reversed(path.split(".")):
        config = {key: config}
    assert refusal(lambda: check_config(config)).startswith(f"config.json: {path} is not true")
    check_config({"is_causal": True, "vision_config": config, "thinker_config": {"audio_config": config}})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_cannot_hold_is_named(value: float) -> None:
    """json reads 1e999 as infinity."""
    text = refusal(lambda: check_config({"rope_scaling": {"factors": [1.0, value]}}))
    assert text.startswith("config.json: rope_scaling.factors.1 is no finite number")


@pytest.mark.parametrize(
    ("model_type", "stored"),
    [
        ("qwen2", "layers"),
        ("llama", "base_model.model.model.layers"),
        ("llama", "module.model.layers"),
        ("qwen2_5_omni", "model.layers"),
    ],
)
def test_weights_of_another_prefix_are_refused_by_both_names(model_type: str, stored: str) -> None:
    architecture = find_architecture({"model_type": model_type})
    names = [f"{stored}.0.{LINEAR}", f"{stored}.1.{LINEAR}", "visual.blocks.0.attn.q.weight"]
    text = refusal(lambda: check_weight_names(architecture, names))
    assert f"'{stored}.0', not '{architecture.block_prefixes[0]}.0'" in text and "save_pretrained" in text
    check_weight_names(architecture, [*names, f"{architecture.block_prefixes[0]}.0.{LINEAR}"])


def test_a_wrapped_linear_of_an_adapter_is_recognized() -> None:
    names = ["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert "inside a wrapper" in refusal(lambda: check_weight_names(find_architecture({"model_type": "llama"}), names))


def edited(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not supported"),
        ({"quantization_config": {}}, "quantization_config is empty"),
        ({"rope_theta": math.nan}, "NaN is not JSON"),
        ({"rope_theta": math.inf}, "Infinity is not JSON"),
    ],
)
def test_a_config_is_refused_before_the_data_are_read(
    changes: dict[str, Any], expected: str, tiny: TinyModels, tmp_path: Path
) -> None:
    model = edited(tiny.model("llama"), tmp_path / "model", **changes)
    assert expected in refusal(lambda: calibrate(model, NO_DATA, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [model]


def test_weights_without_their_prefix_are_refused_before_the_data_are_read(tiny: TinyModels, tmp_path: Path) -> None:
    model = edited(tiny.model("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, model / "model.safetensors", metadata={"format": "pt"})
    text = refusal(lambda: calibrate(model, NO_DATA, tmp_path / "out"))
    assert "'layers.0', not 'model.layers.0'" in text
