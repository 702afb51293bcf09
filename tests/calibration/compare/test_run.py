"""A tiny model and its checkpoint, compared as the command does it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calibration.calibrate import calibrate
from calibration.compare.models import open_side, read_samples
from calibration.compare.run import compare_models
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels
from tests.tiny_conversations import write_calibration_data
from tests.tiny_decoders import build_tiny_decoder


@pytest.mark.full
def test_a_source_and_its_checkpoint(tiny: TinyModels, tmp_path: Path) -> None:
    source, data, output = tiny.model("omni"), tiny.data("omni"), tmp_path / "out"
    calibrate(source, data, output, recipe=Recipe(device="cpu", sample_tokens=64, max_samples=6))
    found = compare_models(source, output, [data])
    assert {"all", "image", "audio"} <= set(found["modalities"])
    # Random weights that few tokens calibrated: far off, but nearer than an unrelated model, whose error is above 1.
    assert len(found["blocks"]) == 2 and all(0 < error < 1 for error in found["blocks"])
    everything = found["modalities"]["all"]
    assert everything["divergence"] > 0
    assert json.loads(json.dumps(found)) == found
    # The same perplexity by transformers' own loss, over the same text tokens.
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    total = 0.0
    for sample in read_samples(open_side(source), [data], 2048, None):
        labels = torch.where(sample.modality == 0, sample.inputs["input_ids"][0], -100)[None]
        with torch.no_grad():
            loss = model(**sample.inputs, labels=labels).loss
        total += float(loss) * int((labels[0, 1:] != -100).sum())
    assert everything["first_perplexity"] == pytest.approx(math.exp(total / everything["tokens"]), rel=1e-4)


@pytest.mark.full
def test_an_architecture_that_is_not_listed(tmp_path: Path) -> None:
    source, output = build_tiny_decoder("granite", tmp_path / "source"), tmp_path / "out"
    data = write_calibration_data(tmp_path / "data", "text")
    calibrate(source, data, output, recipe=Recipe(device="cpu", sample_tokens=64, max_samples=6))
    found = compare_models(source, output, [data])
    assert len(found["blocks"]) == 2 and found["modalities"]["all"]["divergence"] > 0


def test_forms_of_two_models_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    llama, qwen = tiny.model("llama"), tiny.model("qwen3")
    with pytest.raises(MorphoQuantError, match=r"is a qwen3, and .* is a llama; compare two forms of one model"):
        compare_models(llama, qwen, [tiny.data("llama")])
    config = json.loads((llama / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(MorphoQuantError, match="'num_hidden_layers': 5"):
        compare_models(llama, other, [tiny.data("llama")])
    with pytest.raises(MorphoQuantError, match="--dtype 'int8' is unknown"):
        compare_models(llama, llama, [tiny.data("llama")], dtype="int8")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MorphoQuantError, match="transformers cannot load it"):
        compare_models(llama, other, [tiny.data("llama")])


def test_models_whose_files_do_not_fit_are_one_line(tiny: TinyModels, tmp_path: Path) -> None:
    """transformers would draw missing weights at random."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model("llama"), model)
    config = json.loads((model / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"num_hidden_layers": 5}, r"model.layers.2.\S+ is missing in the weight files"),
        ({"intermediate_size": 32}, r"mlp.\S+ is missing in the weight files, or has another shape|cannot load it"),
        ({"hidden_size": "x"}, "transformers cannot load it"),
        ({"hidden_act": "nope"}, "transformers cannot load it"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0|transformers cannot load it"),
    ]
    for change, expected in changes:
        (model / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(MorphoQuantError, match=expected) as caught:
            open_side(model).load(torch.float32)
        assert "\n" not in str(caught.value)
    (model / "config.json").write_text(json.dumps(config))
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(MorphoQuantError, match="transformers cannot load it"):
        open_side(model).load(torch.float32)
