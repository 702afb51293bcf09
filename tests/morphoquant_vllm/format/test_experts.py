"""The routed experts of a checkpoint: their settings and tensors, and how damage is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import check_headers, load_experts, read_spec
from morphoquant_vllm.format.layers import INPUT_TENSORS, MAX_EXPERTS, ExpertsSpec, LayerSpec, input_holder, stored_name
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.checkpoints import HIDDEN, edit, edit_tensors, file_of, flip_bit, layer_specs, write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused

NAME = "model.layers.0.mlp.experts"
EXPERTS = ExpertsSpec(3, HIDDEN, 128, 32, "two_level")
LAYER = LayerSpec(64, 48, 32, "column", "a")


@pytest.fixture(scope="module")
def whole_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    write_random_checkpoint(directory, layers=1, experts={NAME: EXPERTS})
    return directory


@pytest.fixture
def damaged(whole_experts: Path, tmp_path: Path) -> Path:
    for path in whole_experts.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_checkpoint_with_experts_verifies_and_survives_its_json(whole_experts: Path) -> None:
    spec = verify_checkpoint(whole_experts)
    assert spec.experts == {NAME: EXPERTS} and len(spec.layers) == 7 and len(spec.linears) == 7 + 9
    settings = json.loads((whole_experts / "config.json").read_text())["quantization_config"]
    assert settings["experts"][NAME]["intermediate_features"] == 128
    assert QuantizationSpec.from_dict(settings) == spec


def test_settings_without_experts_have_no_such_field() -> None:
    assert "experts" not in QuantizationSpec(layers=layer_specs()).to_dict()


def test_a_plan_with_experts_can_be_read_before_it_is_sealed() -> None:
    spec = QuantizationSpec(layers={}, experts={NAME: EXPERTS})
    assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_experts_are_linears_with_one_input_and_an_input_of_each_down() -> None:
    layers = EXPERTS.layers(NAME)
    assert list(layers)[:3] == [f"{NAME}.0.{projection}_proj" for projection in ("gate", "up", "down")]
    gate, down = layers[f"{NAME}.2.gate_proj"], layers[f"{NAME}.2.down_proj"]
    assert (gate.in_features, gate.out_features, gate.parallel) == (HIDDEN, 128, "column")
    assert (down.in_features, down.out_features, down.parallel) == (128, HIDDEN, "row")
    assert {layer.shared_input for name, layer in layers.items() if "down" not in name} == {f"{NAME}.gate_up_proj"}
    assert down.shared_input == f"{NAME}.2.down_proj"


def test_the_first_gate_holds_the_input_of_all_and_every_down_its_own(whole_experts: Path) -> None:
    spec = read_spec(whole_experts)
    files = check_headers(whole_experts, spec)
    held = {name for name in files if name.endswith("activation_step") and NAME in name}
    assert held == {
        f"{input_holder(NAME)}.activation_step",
        *(f"{NAME}.{e}.down_proj.activation_step" for e in (0, 1, 2)),
    }
    loaded = dict(load_experts(whole_experts, files, NAME, spec))
    assert list(loaded) == list(EXPERTS.layers(NAME))
    for tensors in loaded.values():
        assert set(INPUT_TENSORS) < set(tensors)
    first, last = loaded[f"{NAME}.0.gate_proj"], loaded[f"{NAME}.2.up_proj"]
    assert torch.equal(first["channel_order"], last["channel_order"])
    assert not torch.equal(first["weight_codes"], last["weight_codes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be 1 to"),
        ({"count": MAX_EXPERTS + 1}, f"count must be 1 to {MAX_EXPERTS} experts"),
        ({"count": "3"}, "count must be int"),
        ({"in_features": 2.0}, "in_features must be int"),
        ({"group_size": 48}, "group_size 48 is not one of"),
        ({"intermediate_features": 80}, r"0.down_proj: K = 80 is not divisible"),
        ({"scale_scheme": "x"}, "scale_scheme 'x' is unknown"),
        ({"intermediate_features": 96}, r"0.down_proj: tensor parallel size 2 breaks a group"),
    ],
)
def test_settings_that_break_a_rule(changes: dict[str, object], message: str) -> None:
    experts = ExpertsSpec(**{**vars(EXPERTS), **changes})
    with pytest.raises(MorphoQuantError, match=f"^{NAME}.*{message}"):
        QuantizationSpec(layers={}, tensor_parallel=2, experts={NAME: experts})


@pytest.mark.parametrize("inside", [NAME, f"{NAME}.1.gate_proj"])
def test_a_linear_that_is_listed_twice(inside: str) -> None:
    with pytest.raises(MorphoQuantError, match=f"{inside} is listed, and so is {NAME}"):
        QuantizationSpec(layers={inside: LAYER}, experts={NAME: EXPERTS})


@pytest.mark.parametrize("value", [[], "x", {NAME: 3}, {NAME: {"count": 3}}, {NAME: {**vars(EXPERTS), "smell": 1}}])
def test_settings_of_another_kind(value: object) -> None:
    config = {**QuantizationSpec(layers={"a": LAYER}).to_dict(), "experts": value}
    if not value:
        assert QuantizationSpec.from_dict(config).experts == {}
        return
    with pytest.raises(MorphoQuantError, match="malformed"):
        QuantizationSpec.from_dict(config)


@pytest.mark.parametrize(
    "tensor", ["0.gate_proj.gain", "2.up_proj.weight_codes", "1.down_proj.centre", "2.down_proj.absorbed_bias"]
)
def test_a_missing_tensor_is_named(damaged: Path, tensor: str) -> None:
    name = f"{NAME}.{tensor}"
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    path = file_of(damaged, name)
    edit_tensors(path, {name: None})
    del index["weight_map"][name]
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(damaged, f"tensor {name} is missing")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("1.gate_proj.weight", "is a 16-bit weight of a quantized layer"),
        ("1.gate_proj.gain", "experts of a layer share one input, which the first one holds"),
        ("1.down_proj.smell", "is not a tensor of a quantized layer"),
        ("1.up_proj.bias", "has no bias"),
        ("3.up_proj.weight_codes", "belongs to a quantized layer that quantization_config does not list"),
    ],
)
def test_a_tensor_that_does_not_belong(damaged: Path, tensor: str, message: str) -> None:
    name = f"{NAME}.{tensor}"
    path = file_of(damaged, f"{NAME}.0.gate_proj.gain")
    edit_tensors(path, {name: torch.ones(6)})
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = path.name
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(damaged, name, message)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("2.up_proj.weight_level", lambda level: level * 0, "every level must be 1 to 16"),
        ("1.down_proj.activation_step", lambda step: -step, "every value must be positive"),
        ("0.gate_proj.channel_order", lambda order: order.roll(1) * 0, "must permute"),
        ("2.down_proj.channel_order", lambda order: order.flip(0), "within 2 tensor-parallel blocks"),
        ("1.gate_proj.absorbed_bias", lambda bias: bias * torch.nan, "holds NaN"),
    ],
)
def test_illegal_values_are_named(
    damaged: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    edit(damaged, f"{NAME}.{tensor}", change)
    refused(damaged, f"{NAME}.{tensor}", message)


def test_a_flipped_bit_is_noticed(damaged: Path) -> None:
    flip_bit(damaged, stored_name(f"{NAME}.1.up_proj", "weight_codes"))
    refused(damaged, "is damaged (its SHA-256 is not the recorded one)")
