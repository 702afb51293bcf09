"""Calibration on a GPU: the same bytes again, also after an interruption, and a checkpoint as good as a CPU's."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import morphoquant_vllm.hf
from calibration.blocks.loop import BlockResult
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.calibration.killing import content

DEVICE = "cuda"
TOKENS = torch.arange(3, 131).view(2, 64)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU is at hand"),
]


class Interrupted(Exception):
    """What a user's Ctrl-C does behind a block."""


def interrupt(result: BlockResult) -> None:
    raise Interrupted


def loss(model: nn.Module) -> float:
    """Mean loss over a fixed text, on the torch reference of the CPU."""
    if hasattr(model.config, "quantization_config"):
        morphoquant_vllm.hf.configure(model, reference=True)
    with torch.no_grad():
        return float(model(input_ids=TOKENS, labels=TOKENS).loss)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_same_command_gives_the_same_bytes_also_after_an_interruption(
    tiny: TinyModels, tmp_path: Path, dtype: str
) -> None:
    recipe = Recipe(device=DEVICE, dtype=dtype)
    source, data = tiny.model("llama"), tiny.data("llama")
    for name in ("first", "second"):
        calibrate(source, data, tmp_path / name, recipe=recipe)
    with pytest.raises(Interrupted):
        calibrate(source, data, tmp_path / "cut", recipe=recipe, on_block=interrupt)
    calibrate(source, data, tmp_path / "cut", recipe=recipe)
    expected = content(tmp_path / "first")
    assert content(tmp_path / "second") == expected
    assert content(tmp_path / "cut") == expected


def test_media_and_towers_are_calibrated_there_too(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = Recipe(device=DEVICE, dtype="bfloat16", towers=["image"])
    calibrate(tiny.model("qwen2_5_vl"), tiny.data("qwen2_5_vl"), tmp_path / "out", recipe=recipe)
    assert any(layer.fixed_row for layer in verify_checkpoint(tmp_path / "out").layers.values())


def test_its_checkpoint_is_as_good_as_a_cpu_s(tiny: TinyModels, tmp_path: Path) -> None:
    source, data = tiny.model("llama"), tiny.data("llama")
    for device in (DEVICE, "cpu"):
        calibrate(source, data, tmp_path / device, recipe=Recipe(device=device, dtype="bfloat16"))
    plain, there, here = (
        loss(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32))
        for place in (source, tmp_path / DEVICE, tmp_path / "cpu")
    )
    # Sums in another order move a few codes; the loss of 4 bits itself is larger than that.
    assert abs(there - here) < 0.02 * plain
