import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calibration.model.source import open_source
from morphoquant_vllm.errors import MorphoQuantError


def write_model(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_headers_and_tensors_are_read(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path / "m"))
    assert source.config == {"model_type": "llama"}
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in source.tensors.items()} == {
        "a.weight": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    assert torch.equal(source.load("b"), torch.ones(4, dtype=torch.bfloat16))


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(1)}, model / "model-00002-of-00002.safetensors")
    save_file({"stray": torch.zeros(1)}, model / "consolidated.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(model, {"c": second, "b": first, "a.weight": first})
    source = open_source(model)
    assert list(source.tensors) == ["a.weight", "b", "c"]
    assert source.tensors["c"].file.name == second


def refuse(directory: Path, expected: str) -> None:
    with pytest.raises(MorphoQuantError, match=expected) as caught:
        open_source(directory)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_config_or_weight_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "none: no such model directory")
    model = write_model(tmp_path / "m")
    (model / "model.safetensors").rename(tmp_path / "kept")
    refuse(model, "m: no weights")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    refuse(model, "has pytorch_model.bin but no model.safetensors; only safetensors")
    (model / "config.json").unlink()
    refuse(model, "m: no config.json")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-4])
    refuse(model, "model.safetensors: truncated or not safetensors")
    (model / "model.safetensors").write_bytes(b"no header at all")
    refuse(model, "model.safetensors: truncated or not safetensors")
    (model / "config.json").write_text("{")
    refuse(model, "config.json: cannot be read as JSON")
    (model / "config.json").write_text("[]")
    refuse(model, "config.json: does not hold a JSON object")


def test_an_index_must_fit_its_files(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    write_index(model, {"a.weight": "model-00001-of-00001.safetensors"})
    refuse(model, r"has model.safetensors and .*index.json, which does not name it; remove one of the two")
    write_index(model, {"a.weight": "model-00001-of-00001.safetensors", "b": "model.safetensors"})
    refuse(model, "model-00001-of-00001.safetensors: named in .* but missing")
    write_index(model, {"z": "model.safetensors"})
    refuse(model, "model.safetensors: z is in .* but missing here")
    write_index(model, {"z": "weights.bin"})
    refuse(model, "only safetensors weights are read")
    write_index(model, {"z": "../model.safetensors"})
    refuse(model, "which is not a file name")
    write_index(model, {})
    refuse(model, "no weight_map")


INT4 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}}


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "morphoquant"}, INT4, [1]])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_another_quantized_source_is_refused_by_name(tmp_path: Path, settings: Any, key: str) -> None:
    model = write_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps({"text_config": {key: settings}}))
    method = settings["quant_method"] if isinstance(settings, dict) else "unknown means"
    refuse(model, rf"already quantized \(quantization_config\) by {method}; download the 16-bit original, or its FP8")
    (model / "README.md").write_text("---\nlicense: mit\nbase_model:\n- org/Base-7B\n---\n# Card\n")
    refuse(model, r"download the 16-bit original \(org/Base-7B\), or its FP8 version")


def test_a_file_holds_what_the_index_places_in_it_and_no_more(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    write_index(model, {"a.weight": "model.safetensors"})
    refuse(model, r"model.safetensors: holds b, which model.safetensors.index.json does not place there")


@pytest.mark.parametrize(
    "config", [{"transformers_weights": "o.safetensors"}, {"text_config": {"transformers_weights": "o"}}]
)
def test_weights_of_another_file_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    model = write_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps(config))
    refuse(model, r"config.json: \S*transformers_weights names another weight file; remove it")


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    """transformers would add it to the embedding and the towers, if PEFT is installed."""
    model = write_model(tmp_path / "m")
    (model / "adapter_config.json").write_text("{}")
    refuse(model, "adapter_config.json: transformers would add this adapter to the model; merge it first")


def test_a_directory_whose_path_is_not_utf8_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "pos\udce9"
    directory.mkdir()
    with pytest.raises(MorphoQuantError, match="the path is not UTF-8, which safetensors needs; rename it"):
        open_source(directory)
