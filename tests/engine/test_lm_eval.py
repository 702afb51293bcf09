"""lm-eval against `vllm serve` on a checkpoint, by its local-completions client."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration

import morphoquant_vllm.hf  # noqa: F401 (registers the quantizer)
from benchmarks.common.server import Server
from tests import harness

pytestmark = pytest.mark.slow

# Tolerance of a sum over a few tokens, each within 1e-3 of the served one.
TOLERANCE = 5e-3


def test_local_completions(
    server: Server, omni_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model": str(omni_checkpoint),
        "base_url": f"{server.openai_url}/completions",
        "tokenizer": str(omni_checkpoint),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "4",
    }
    arguments = ",".join(f"{key}={value}" for key, value in settings.items())
    results = harness.run(monkeypatch, tmp_path, "--model", "local-completions", "--model_args", arguments)
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(omni_checkpoint, dtype=torch.float32)
    harness.assert_logged(results, model, AutoTokenizer.from_pretrained(omni_checkpoint), TOLERANCE)
