"""lm-eval on a checkpoint through transformers, by the one-line wrapper of docs/guide/evaluate.md."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import morphoquant_vllm.hf
from calibration.calibrate import calibrate
from tests import harness
from tests.calibration.built_models import TinyModels

pytestmark = pytest.mark.slow

# lm-eval evaluates several choices in one padded batch, which changes the order of sums.
TOLERANCE = 1e-3


def test_the_wrapper_evaluates_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = TinyModels(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    calibrate(tiny.model("llama"), tiny.data("llama"), checkpoint)
    wrapper = re.search(r"python -c '(.*)'", (harness.REPOSITORY / "docs" / "guide" / "evaluate.md").read_text())
    assert wrapper is not None
    assert wrapper[1] == "import morphoquant_vllm.hf, lm_eval.__main__ as m; m.cli_evaluate()"
    arguments = ("--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu")
    results = harness.run(monkeypatch, tmp_path / "results", *arguments, "--batch_size", "2")
    assert "tiny_places" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert any(isinstance(module, morphoquant_vllm.hf.MorphoQuantLinear) for module in model.modules())
    harness.assert_logged(results, model, AutoTokenizer.from_pretrained(checkpoint), TOLERANCE)
