"""A valid checkpoint verifies; each way to damage one is refused in one line that names the thing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.format.checkpoint import check_headers, load_layer, read_spec
from morphoquant_vllm.format.layers import tensor_specs
from morphoquant_vllm.format.schema import FORMAT_VERSION
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.checkpoints import edit, edit_tensors, file_of, set_bias, write_config, write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused

INDEX = "model.safetensors.index.json"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_valid_checkpoint_verifies(pristine: Path) -> None:
    assert len(verify_checkpoint(pristine).layers) == 14


def test_one_file_verifies(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, single_file=True)
    assert len(verify_checkpoint(tmp_path).layers) == 14


def test_spec_survives_the_round_trip_through_config_json(tmp_path: Path) -> None:
    spec = write_random_checkpoint(tmp_path)
    assert read_spec(tmp_path) == spec


@pytest.mark.parametrize(("name", "bias"), [(Q, {"bias"}), (DOWN, set())])
def test_load_layer_gives_every_tensor_and_the_bias(pristine: Path, name: str, bias: set[str]) -> None:
    spec = read_spec(pristine)
    tensors = load_layer(pristine, check_headers(pristine, spec), name, spec)
    expected = tensor_specs(spec.layers[name], len(spec.rows), spec.tensor_parallel)
    assert set(tensors) == {*expected, *bias}
    for tensor, want in expected.items():
        assert (tensors[tensor].dtype, tuple(tensors[tensor].shape)) == (want.dtype, want.shape)


# --- config.json


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such file")


def test_missing_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "config.json", "no such file")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_config_that_is_not_a_json_object(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    refused(checkpoint, "config.json", "copy it again")


def test_plain_model(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    refused(checkpoint, "plain model", "morphoquant calibrate")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"format_version": FORMAT_VERSION + 1}, f"format_version {FORMAT_VERSION + 1} is unknown"),
        ({"layers": {}}, "no quantized layer"),
        ({"format_version": 1}, "format_version 1 is unknown"),
        ({"rows": ["text"]}, "'any'"),
        ({"rows": ["text", "any"]}, "the last row must be 'massive'"),
        ({"tensor_parallel": 4}, "tensor parallel size 4 breaks a group"),
        ({"tensor_parallel": 0}, "tensor_parallel must be 1 or more"),
    ],
)
def test_config_that_breaks_a_rule(checkpoint: Path, changes: dict[str, object], fragment: str) -> None:
    write_config(checkpoint, read_spec(checkpoint), **changes)
    refused(checkpoint, "config.json", fragment)


@pytest.mark.parametrize(
    ("setting", "value", "fragment"),
    [
        ("scale_scheme", "magic", "'magic' is unknown"),
        ("scale_scheme", "two_level", "must share"),
        ("group_size", 48, "group_size 48"),
        ("group_size", 128, "not divisible by group_size 128"),
        ("bias", "no", "bias must be bool"),
        ("colour", "red", "malformed"),
    ],
)
def test_layer_settings_that_break_a_rule(checkpoint: Path, setting: str, value: object, fragment: str) -> None:
    spec = read_spec(checkpoint)
    layers = spec.to_dict()["layers"]
    layers[Q][setting] = value
    write_config(checkpoint, spec, layers=layers)
    refused(checkpoint, "config.json", fragment)


# --- files and index


def test_no_weights(checkpoint: Path) -> None:
    for path in checkpoint.glob("model*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    refused(checkpoint, "only safetensors")


def test_missing_file(checkpoint: Path) -> None:
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    refused(checkpoint, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("keep", [-1, 100, 0])
def test_truncated_file(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(checkpoint, path.name, "truncated or not safetensors", "copy it again")


def test_pickle_in_the_place_of_safetensors(checkpoint: Path) -> None:
    path = checkpoint / "model-00001-of-00002.safetensors"
    path.unlink()
    torch.save({}, path)
    refused(checkpoint, path.name, "not safetensors")


def test_index_that_names_a_tensor_no_file_holds(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda index: index.update({"ghost.weight": "model-00001-of-00002.safetensors"}))
    refused(checkpoint, "ghost.weight", "missing here")


def test_file_that_holds_a_tensor_the_index_does_not_name(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda index: index.pop("model.norm.weight") and None)
    refused(checkpoint, "model.norm.weight", "does not place there")


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "model.bin", 3, "a\0.safetensors", "a\n.safetensors", "\ud800.safetensors"]
)
def test_index_that_names_no_safetensors_file_here(checkpoint: Path, file: str) -> None:
    edit_index(checkpoint, lambda index: index.update({"ghost.weight": file}))
    refused(checkpoint, INDEX, "ghost.weight")


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", '{"a": 1', "[]", '{"a": NaN}'])
def test_a_damaged_file_beside_the_weights(checkpoint: Path, file: str, content: str) -> None:
    (checkpoint / file).write_text(content)
    refused(checkpoint, file, "JSON")


def test_index_without_weight_map(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text("{}")
    refused(checkpoint, INDEX, "weight_map")


def test_no_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()
    refused(checkpoint, INDEX)


def test_lost_tensor_that_is_not_quantized(checkpoint: Path) -> None:
    edit_tensors(file_of(checkpoint, "model.norm.weight"), {"model.norm.weight": None})
    refused(checkpoint, "model.norm.weight", "missing")


def test_stray_tensor_that_is_not_quantized(checkpoint: Path) -> None:
    edit_tensors(file_of(checkpoint, "model.norm.weight"), {"stray.weight": torch.ones(2)})
    refused(checkpoint, "stray.weight", INDEX)


# --- headers


@pytest.mark.parametrize("tensor", ["absorbed_bias", "channel_order", "massive_low", "bias"])
def test_missing_tensor(checkpoint: Path, tensor: str) -> None:
    name = f"{Q}.{tensor}"
    edit_tensors(file_of(checkpoint, name), {name: None})
    edit_index(checkpoint, lambda index: index.pop(name) and None)
    refused(checkpoint, name, "missing")


@pytest.mark.parametrize(
    ("tensor", "fragment"), [("weight", "16-bit weight"), ("g_idx", "not a tensor of a quantized")]
)
def test_extra_tensor(checkpoint: Path, tensor: str, fragment: str) -> None:
    path = file_of(checkpoint, f"{Q}.gain")
    edit_tensors(path, {f"{Q}.{tensor}": torch.zeros(3)})
    edit_index(checkpoint, lambda index: index.update({f"{Q}.{tensor}": path.name}))
    refused(checkpoint, f"{Q}.{tensor}", fragment)


def test_bias_that_the_config_denies(checkpoint: Path) -> None:
    write_config(checkpoint, set_bias(read_spec(checkpoint), Q, False))
    refused(checkpoint, f"{Q}.bias", "has no bias")


def test_wrong_shape(checkpoint: Path) -> None:
    edit(checkpoint, f"{Q}.weight_scale", lambda scale: scale[:, :1].contiguous())
    refused(checkpoint, f"{Q}.weight_scale", "[64, 1]", "expected BF16 [64, 2]")


@pytest.mark.parametrize(
    ("tensor", "rows", "expected"),
    [
        ("modality_mask", 0, "BOOL [5, 64], expected BOOL [6, 64]"),
        ("centre", 0, "F32 [5, 64], expected F32 [6, 64]"),
        ("gain", 0, "F32 [5], expected F32 [6]"),
        ("absorbed_bias", 1, "F32 [1, 5, 64], expected F32 [1, 6, 64]"),
    ],
)
def test_a_row_count_that_differs_between_layers(checkpoint: Path, tensor: str, rows: int, expected: str) -> None:
    edit(checkpoint, f"{Q}.{tensor}", lambda value: value.narrow(rows, 0, 5).contiguous())
    refused(checkpoint, f"{Q}.{tensor}", expected)


def test_blocks_of_another_tensor_parallel_size(checkpoint: Path) -> None:
    write_config(checkpoint, read_spec(checkpoint), tensor_parallel=1)
    refused(checkpoint, ".o_proj.massive_channel", "[2, 4]", "expected I32 [1, 4]")


def test_wrong_dtype(checkpoint: Path) -> None:
    edit(checkpoint, f"{Q}.weight_scale", lambda scale: scale.half())
    refused(checkpoint, f"{Q}.weight_scale", "F16", "expected BF16")


def test_headers_do_not_read_values(checkpoint: Path) -> None:
    edit(checkpoint, f"{Q}.weight_scale", lambda scale: scale * torch.nan)
    assert f"{Q}.weight_scale" in check_headers(checkpoint, read_spec(checkpoint))
