"""FP8 sources are read as the 16-bit models that they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.calibrate import calibrate
from calibration.model.architectures import find_architecture
from calibration.model.block_loader import BlockLoader
from calibration.model.fp8 import quantization_configs, without_quantization
from calibration.model.loading import load_front
from calibration.model.plan import decoder_names
from calibration.model.source import open_source
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels
from tests.calibration.fp8_models import BLOCK_WISE, CHANNEL_WISE, TENSOR_WISE, write_fp8

DECODER = (".layers.",)
RECIPE = Recipe(device="cpu")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [(BLOCK_WISE, "block-wise FP8"), (CHANNEL_WISE, "FP8 of compressed-tensors"), (TENSOR_WISE, "FP8")],
)
def test_an_fp8_model_has_the_tensors_of_its_16_bit_model(
    tiny: TinyModels, tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    write_fp8(tiny.model("qwen3"), tmp_path / "fp8", tmp_path / "plain", settings, DECODER)
    fp8, plain = open_source(tmp_path / "fp8"), open_source(tmp_path / "plain")
    assert (fp8.fp8, plain.fp8) == (kind, "")
    assert fp8.config == plain.config and list(fp8.tensors) == list(plain.tensors)
    assert sum(info.scale is not None for info in fp8.tensors.values()) == 14
    for name, info in fp8.tensors.items():
        assert (info.dtype, info.shape, info.nbytes) == (
            plain.tensors[name].dtype,
            plain.tensors[name].shape,
            plain.tensors[name].nbytes,
        )
        assert torch.equal(fp8.load(name), plain.load(name)), name


@pytest.mark.parametrize(("name", "parts"), [("qwen3", DECODER), ("qwen2_5_vl", ("layers.", "blocks.", "lm_head"))])
def test_an_fp8_model_loads_as_its_16_bit_model(
    tiny: TinyModels, tmp_path: Path, name: str, parts: tuple[str, ...]
) -> None:
    write_fp8(tiny.model(name), tmp_path / "fp8", tmp_path / "plain", BLOCK_WISE, parts)
    fronts, blocks = [], []
    for directory in ("fp8", "plain"):
        source = open_source(tmp_path / directory)
        architecture = find_architecture(source.config)
        fronts.append(load_front(architecture, source, RECIPE, stream_towers=directory == "fp8").state_dict())
        names = decoder_names(architecture, source.config, source.tensors)
        blocks.append(BlockLoader(architecture, source, names, RECIPE).load(1).state_dict())
    for found, expected in (fronts, blocks):
        assert found.keys() == expected.keys()
        loaded = {key: value for key, value in expected.items() if value.device.type != "meta"}
        assert loaded
        for key, value in loaded.items():
            assert torch.equal(found[key], value), key


def test_settings_are_dropped_at_any_depth_and_empty_ones_stay() -> None:
    config = {"quantization_config": BLOCK_WISE, "text_config": {"quantization_config": BLOCK_WISE, "a": [1]}, "b": {}}
    assert list(quantization_configs(config)) == [BLOCK_WISE, BLOCK_WISE]
    assert without_quantization(config) == {"text_config": {"a": [1]}, "b": {}}
    assert without_quantization({"quantization_config": {}}) == {"quantization_config": {}}


@pytest.mark.parametrize("problem", ["no scale", "a scale of shape [7, 7]"])
def test_an_fp8_weight_without_a_fitting_scale_is_refused(tiny: TinyModels, tmp_path: Path, problem: str) -> None:
    write_fp8(tiny.model("qwen3"), tmp_path / "fp8", tmp_path / "plain", BLOCK_WISE, DECODER)
    file = next((tmp_path / "fp8").glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors.pop(f"{name}_scale_inv")
    if problem != "no scale":
        tensors[f"{name}_scale_inv"] = torch.ones(7, 7)
    save_file(tensors, file)
    (tmp_path / "fp8" / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(MorphoQuantError) as caught:
        open_source(tmp_path / "fp8")
    assert f"{name} is FP8 with {problem}; download the 16-bit original" in str(caught.value)


def test_fp8_weights_without_settings_need_a_scale_that_explains_itself(tiny: TinyModels, tmp_path: Path) -> None:
    for settings, name in ((TENSOR_WISE, "tensor"), (BLOCK_WISE, "block")):
        fp8 = tmp_path / name
        write_fp8(tiny.model("qwen3"), fp8, tmp_path / f"{name}-plain", settings, DECODER)
        config = json.loads((fp8 / "config.json").read_text())
        config.pop("quantization_config")
        (fp8 / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path / "tensor").fp8 == "FP8"
    with pytest.raises(MorphoQuantError, match=r"is FP8 with a scale of shape \[\d+, \d+\]; download the 16-bit"):
        open_source(tmp_path / "block")


@pytest.mark.full
def test_a_checkpoint_of_an_fp8_model_is_that_of_its_16_bit_model(tiny: TinyModels, tmp_path: Path) -> None:
    write_fp8(tiny.model("qwen3"), tmp_path / "fp8", tmp_path / "plain", BLOCK_WISE, DECODER)
    (tmp_path / "text.txt").write_text("Two rivers meet below the old town, where the market is held. " * 20)
    for name in ("fp8", "plain"):
        report = calibrate(tmp_path / name, tmp_path / "text.txt", tmp_path / f"{name}-out", recipe=RECIPE)
        assert report.get("source") == ({"weights": "block-wise FP8, read as bfloat16"} if name == "fp8" else None)
    fp8, plain = (tmp_path / f"{name}-out" for name in ("fp8", "plain"))
    files = sorted(file.name for file in plain.glob("*.safetensors"))
    assert files and sorted(file.name for file in fp8.glob("*.safetensors")) == files
    for name in files:
        assert (fp8 / name).read_bytes() == (plain / name).read_bytes()
    config = json.loads((fp8 / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "morphoquant"
    assert config.keys() == json.loads((plain / "config.json").read_text()).keys()
