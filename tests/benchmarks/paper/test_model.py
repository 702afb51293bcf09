"""The model's directory: missing files are named, sizes are told with and without weights."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.paper import model
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests import tiny_models
from tests.tiny_conversations import write_calibration_data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_tiny_omni(tmp_path_factory.mktemp("omni") / "source")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def header_only(directory: Path) -> int:
    """Cut the weights after their header; return the bytes that are left."""
    path = directory / "model.safetensors"
    found = model.read_header(path)
    assert found is not None
    path.write_bytes(path.read_bytes()[: found[1]])
    return found[1]


def test_nothing_is_missing_of_a_whole_model(whole: Path) -> None:
    assert model.missing_files(whole, weights=True) == []


def test_each_missing_file_has_its_line(copy: Path) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        (copy / name).unlink()
    lines = model.missing_files(copy, weights=True)
    assert [line.split(":")[0] for line in lines] == [
        str(copy / name) for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors")
    ]
    assert len(model.missing_files(copy, weights=False)) == 3
    (line,) = model.missing_files(copy / "none", weights=True)
    assert "no such model directory" in line


@pytest.mark.parametrize("header", ["[]", "[" * 100_000, '{"a": 1}', '{"a": {"dtype": "BF16", "shape": [1]}}'])
def test_a_weight_file_with_another_header_is_named(copy: Path, header: str) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert model.missing_files(copy, weights=True) == [f"{path}: not safetensors; download it again"]


def test_a_model_that_names_flash_attention_has_sizes_without_its_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    config = json.loads((copy / "config.json").read_text())
    before = model.sizes(copy)
    (copy / "config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    assert model.sizes(copy) == before


def test_the_shards_that_an_index_names_must_be_there_and_whole(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (line,) = model.missing_files(copy, weights=True)
    assert line == f"{copy / 'model-2.safetensors'}: missing; download it again"
    content = (copy / "model-1.safetensors").read_bytes()
    (copy / "model-2.safetensors").write_bytes(content[:-10])
    assert "model-2.safetensors: 10 bytes short; download" in model.missing_files(copy, weights=True)[0]
    (copy / "model-2.safetensors").write_bytes(b"no")
    assert "model-2.safetensors: not safetensors" in model.missing_files(copy, weights=True)[0]
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MorphoQuantError, match="no index of weights"):
        model.missing_files(copy, weights=True)


# Calibrates.
@pytest.mark.full
def test_sizes_are_those_of_the_files_of_a_checkpoint_that_is_made(whole: Path, tmp_path: Path) -> None:
    sizes = model.sizes(whole)
    recipe = Recipe(sample_tokens=64, max_samples=2)
    calibrate(whole, write_calibration_data(tmp_path / "data"), tmp_path / "out", recipe=recipe)
    made = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    # Headers and small files beside the weights differ.
    assert sizes.checkpoint == pytest.approx(made, rel=0.1)
    with safe_open(str(whole / "model.safetensors"), "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert sizes.sixteen_bit == stored
    # Two blocks of the tiny decoder: q, k, v, o, gate, up, down.
    assert sizes.quantized == 2 * (128 * (128 + 64 + 64) + 128 * 128 + 3 * 128 * 256)


def test_sizes_are_known_from_headers_alone_and_about_so_from_the_config_alone(whole: Path, copy: Path) -> None:
    expected = model.sizes(whole)
    header_only(copy)
    assert model.sizes(copy) == expected
    assert "bytes short" in model.missing_files(copy, weights=True)[0]
    (copy / "model.safetensors").unlink()
    without = model.sizes(copy)
    assert without.quantized == expected.quantized
    # Some parts are stored in float32.
    assert without.sixteen_bit == pytest.approx(expected.sixteen_bit, rel=0.1)


def test_a_config_of_another_kind_is_refused_in_one_line(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(MorphoQuantError, match="model_type 'other' is not supported"):
        model.sizes(copy)
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["NoModel"]}))
    (copy / "model.safetensors").unlink()
    with pytest.raises(MorphoQuantError, match="names no class of transformers: 'NoModel'"):
        model.sizes(copy)


def test_the_processor_takes_a_picture_and_a_sound(whole: Path, copy: Path) -> None:
    # 224 x 224 pixels are 64 tokens, a second of sound 25; the rest is text and marks.
    assert model.check_processor(whole) > 64 + 25
    (copy / "tokenizer.json").unlink()
    with pytest.raises(MorphoQuantError, match=r"copy tokenizer\.json into the directory"):
        model.check_processor(copy)


def test_another_model_has_another_identity(whole: Path, copy: Path) -> None:
    assert model.identity(copy) == model.identity(whole)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config + "\n")
    assert model.identity(copy) != model.identity(whole)
    (copy / "config.json").write_text(config)
    header_only(copy)
    assert model.identity(copy) != model.identity(whole)
