"""An incomplete or changed checkpoint is refused with the name of the missing or changed thing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.checkpoints import flip_bit, seal_again, write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused

INDEX = "model.safetensors.index.json"
FILE = "model-00001-of-00001.safetensors"
ATTENTION = "model.layers.1.self_attn."


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A valid checkpoint of one file."""
    write_random_checkpoint(tmp_path / "whole", single_file=True)
    return tmp_path / "whole"


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def drop(directory: Path, *prefixes: str) -> None:
    """Take tensors out of file and index alike, as if they had never been; nothing is sealed again."""
    tensors = {name: value for name, value in load_file(directory / FILE).items() if not name.startswith(prefixes)}
    save_file(tensors, directory / FILE)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, FILE)}))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_carried_tensor_that_is_gone_from_file_and_index(whole: Path, name: str) -> None:
    drop(whole, name)
    refused(whole, f"tensor {name} is missing")


def test_a_layer_that_is_gone_with_its_entry(whole: Path) -> None:
    drop(whole, ATTENTION)

    def strike(config: dict[str, Any]) -> None:
        layers = config["quantization_config"]["layers"]
        config["quantization_config"]["layers"] = {k: v for k, v in layers.items() if not k.startswith(ATTENTION)}

    edit_config(whole, strike)
    refused(whole, "settings changed after the checkpoint was made")


def test_tensors_of_a_layer_that_is_not_listed(whole: Path) -> None:
    """Also in version 2, which has no list."""
    to_version_2(whole)
    edit_config(whole, lambda config: config["quantization_config"]["layers"].pop("model.layers.0.mlp.down_proj"))
    refused(whole, "model.layers.0.mlp.down_proj.", "quantized layer that quantization_config does not list")


def test_a_tensor_that_nobody_wrote(whole: Path) -> None:
    tensors = {**load_file(whole / FILE), "model.extra.weight": torch.ones(2)}
    save_file(tensors, whole / FILE)
    (whole / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, FILE)}))
    refused(whole, "tensor model.extra.weight is not in the checkpoint's list")


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 3), ("tie_word_embeddings", False), ("model_type", "qwen2"), ("new", 1)]
)
def test_a_field_of_config_json_that_changed(whole: Path, field: str, value: object) -> None:
    edit_config(whole, lambda config: config.update({field: value}))
    refused(whole, f"config.json: {field} changed after the checkpoint was made")


def test_fields_that_do_not_say_what_the_weights_mean_may_change(whole: Path) -> None:
    edit_config(whole, lambda config: config.update(dtype="float16", transformers_version="6", _name_or_path="x"))
    verify_checkpoint(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings["rows"].insert(0, settings["rows"].pop(1)),
        lambda settings: settings.update(tensor_parallel=1),
        lambda settings: settings["placeholder_token_ids"].update(image=[9]),
        lambda settings: settings["layers"]["model.layers.0.mlp.down_proj"].update(fixed_row="image"),
    ],
    ids=["rows", "tensor_parallel", "placeholders", "fixed_row"],
)
def test_a_setting_that_changed(whole: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_config(whole, lambda config: change(config["quantization_config"]))
    refused(whole, "settings changed after the checkpoint was made")


def test_free_text_may_change(whole: Path) -> None:
    edit_config(whole, lambda config: config["quantization_config"].update(created_by="a mirror"))
    verify_checkpoint(whole)


# One bit of it, and every value stays legal.
CODES = "model.layers.0.mlp.down_proj.weight_codes"


def test_a_flipped_bit(whole: Path) -> None:
    flip_bit(whole, CODES)
    refused(whole, FILE, "is damaged (its SHA-256 is not the recorded one)")


def test_checksums_can_be_left_out(whole: Path) -> None:
    flip_bit(whole, CODES)
    verify_checkpoint(whole, checksums=False)


def test_the_caller_is_told_of_every_byte(whole: Path) -> None:
    read: list[int] = []
    verify_checkpoint(whole, on_bytes=read.append)
    assert sum(read) == (whole / FILE).stat().st_size


def to_version_2(directory: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["quantization_config"]["integrity"]
        config["quantization_config"]["format_version"] = 2

    edit_config(directory, change)


def test_version_2_is_read_and_says_what_is_not_known(whole: Path) -> None:
    to_version_2(whole)
    hashed: list[int] = []
    assert verify_checkpoint(whole, on_bytes=hashed.append).integrity is None
    assert hashed == [], "there is no hash to compare with"


def test_a_version_that_was_set_back(whole: Path) -> None:
    edit_config(whole, lambda config: config["quantization_config"].update(format_version=2))
    refused(whole, "integrity is unknown in format_version 2")


def test_version_3_without_its_lists(whole: Path) -> None:
    edit_config(whole, lambda config: config["quantization_config"].update(integrity=None))
    refused(whole, "quantization_config is malformed")
    edit_config(whole, lambda config: config["quantization_config"].pop("integrity"))
    refused(whole, "integrity is missing")


@pytest.mark.parametrize("part", ["files", "carried", "config", "settings"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}, {"a": {"bytes": "1", "sha256": 1}}])
def test_lists_of_another_kind(whole: Path, part: str, value: object) -> None:
    edit_config(whole, lambda config: config["quantization_config"]["integrity"].update({part: value}))
    refused(whole, "config.json")


def test_magnitudes_of_the_cache_are_optional_sealed_and_checked(whole: Path) -> None:
    edit_config(whole, lambda config: config["quantization_config"].update(kv_cache={}))
    verify_checkpoint(whole)
    found = {"model.layers.0": {"query": 1.5, "key": 20.0, "value": 0}}
    edit_config(whole, lambda config: config["quantization_config"].update(kv_cache=found))
    refused(whole, "its settings changed")
    seal_again(whole)
    assert read_spec(whole).kv_cache == {"model.layers.0": AttentionRange(1.5, 20.0, 0)}
    for wrong in (-1.0, "20", True, 1e999, float("nan"), 10**400, 1e20):
        with pytest.raises(MorphoQuantError, match=r"largest key, which must be a number of 0 to 1.8e\+19"):
            AttentionRange(1.5, wrong, 0).check("model.layers.0")
    edit_config(whole, lambda config: config["quantization_config"].update(kv_cache={"model.layers.0": {"key": 1.0}}))
    refused(whole, "is malformed")


def test_layers_of_other_bits_are_refused_by_name(whole: Path) -> None:
    """So does a version that serves no 8-bit weights refuse those."""
    down = "model.layers.0.mlp.down_proj"
    edit_config(whole, lambda config: config["quantization_config"]["layers"][down].update(weight_bits=6))
    refused(whole, f"{down}: weight_bits 6 is not served by this version")


def test_settings_survive_the_file(whole: Path) -> None:
    settings = json.loads((whole / "config.json").read_text())["quantization_config"]
    assert QuantizationSpec.from_dict(settings).to_dict() == settings


def test_weights_beside_those_of_the_index(whole: Path) -> None:
    save_file({"a": torch.ones(1)}, whole / "model.safetensors")
    refused(whole, "model.safetensors: is not named in", "remove one of the two")
