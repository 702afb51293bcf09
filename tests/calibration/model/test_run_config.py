"""Settings of a run that a publisher left in config.json change nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Qwen2_5_VLConfig

from calibration.compare.models import open_side
from calibration.data.data_files import load_conversations
from calibration.model.architectures import find_architecture
from calibration.model.loading import load_front
from calibration.model.run_config import prepare_run
from calibration.model.source import open_source
from calibration.settings.recipe import Recipe
from tests.calibration.built_models import TinyModels
from tests.calibration.rendering import build


@pytest.mark.parametrize(
    "left",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"return_dict": False, "output_attentions": True, "output_hidden_states": True},
    ],
)
def test_a_model_with_settings_of_a_run_is_loaded_and_compared(
    tiny: TinyModels, tmp_path: Path, left: dict[str, Any]
) -> None:
    shutil.copytree(tiny.model("llama"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | left))
    source = open_source(tmp_path / "model")
    ids = build(source.directory, load_conversations(tiny.data("llama")))[0].inputs["input_ids"]
    model = load_front(find_architecture(source.config), source, Recipe(device="cpu"))
    assert model.config._attn_implementation == "sdpa"
    plain, found = (
        open_side(directory).load(torch.float32)(input_ids=ids) for directory in (tiny.model("llama"), source.directory)
    )
    assert torch.equal(plain.logits, found.logits) and found.hidden_states is None


def test_parts_are_prepared_and_a_cap_on_scores_needs_plain_attention() -> None:
    config = Qwen2_5_VLConfig()
    config.text_config._attn_implementation = "flash_attention_2"
    assert prepare_run(config).text_config._attn_implementation is None
    assert prepare_run(Gemma2Config())._attn_implementation == "eager"
