"""Tensors of decoder blocks that the files hold and the model does not."""

from pathlib import Path

import pytest
import torch

from calibration.calibrate import plan_job
from calibration.processes import ONE
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels, with_tensors


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.router.weight", "self_attn.masked_bias"]
)
def test_a_tensor_of_a_block_that_nothing_reads_is_refused_before_any_work(
    tiny: TinyModels, tmp_path: Path, name: str
) -> None:
    full = f"model.layers.1.{name}"
    with_tensors(tiny.model("llama"), tmp_path, {full: torch.ones(128)})
    with pytest.raises(MorphoQuantError, match=rf"{full} is in the files, but LlamaForCausalLM has no such tensor"):
        plan_job(tmp_path, Recipe(device="cpu"), None, ONE)


def test_tensors_that_transformers_or_a_server_knows_are_taken(tiny: TinyModels, tmp_path: Path) -> None:
    block = "model.layers.1.self_attn"
    added = {f"{block}.rotary_emb.inv_freq": torch.ones(16), f"{block}.k_scale": torch.ones(())}
    # Masks of GPT's attention.
    added |= {f"model.layers.1.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}
    with_tensors(tiny.model("llama"), tmp_path, added)
    plan_job(tmp_path, Recipe(device="cpu"), None, ONE)
