"""Gemma 3 270M from its package, which is not a dependency."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import gemma3
from morphoquant_vllm.errors import MorphoQuantError

HAS_PACKAGE = importlib.util.find_spec(gemma3.PACKAGE.replace("-", "_")) is not None


@pytest.mark.skipif(HAS_PACKAGE, reason="the package is installed")
def test_without_its_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match=r"its package is missing; if you accept .* pip install gemma3-270m"):
        gemma3.write_model(tmp_path / "gemma")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(not HAS_PACKAGE, reason="the package is not installed: its terms are the user's to accept")
def test_the_model_writes_sense_after_its_first_token(tmp_path: Path) -> None:
    directory = gemma3.write_model(tmp_path / "gemma")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gemma"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    written = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert len(set(written.split())) > 8, "without its first token it repeats one word"
