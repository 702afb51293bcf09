"""Files beside the weights, which a checkpoint gets as they are: what it would be refused for is refused before."""

import json
import shutil
from pathlib import Path

import pytest

from calibration.calibrate import plan_job
from calibration.model.source import open_source
from calibration.processes import ONE
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(MorphoQuantError, match=message):
        plan_job(directory, Recipe(device="cpu"), None, ONE)


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_damaged_file_is_named_before_any_work(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(tiny.model("llama"), tmp_path / "model")
    (model / name).write_text("{")
    refuse(model, f"{model / name}: cannot be read as JSON")


def test_a_placeholder_that_the_tokenizer_does_not_set_apart_is_named(tiny: TinyModels, tmp_path: Path) -> None:
    model = shutil.copytree(tiny.model("qwen2_5_vl"), tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "image_pad" not in token["content"]]
    (model / "tokenizer.json").write_text(json.dumps(content))
    refuse(model, "for image, but the tokenizer does not list it as an added token")


def test_an_index_without_metadata_is_named_with_the_remedy(tiny: TinyModels, tmp_path: Path) -> None:
    model = shutil.copytree(tiny.model("llama"), tmp_path / "model")
    names = open_source(model).tensors
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    refuse(model, f"{index}: no metadata, which transformers asks for")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}))
    plan_job(model, Recipe(device="cpu"), None, ONE)
