"""One sentence that vLLM-Omni speaks from a checkpoint, on a GPU; part of `make gpu-full`, not run yet."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import calibrate
from tests.engine.rows import REPOSITORY
from tests.tiny_speech import build_speaking_omni

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.skipif(not torch.cuda.device_count(), reason="no GPU is at hand"),
    pytest.mark.skipif(find_spec("vllm_omni") is None, reason="the package vllm-omni is not installed"),
]


def test_a_sentence_is_spoken(omni_data: Path, tmp_path: Path) -> None:
    source = build_speaking_omni(tmp_path / "source")
    quick = ("--rounding", "nearest", "--no-regression", "--max-samples", "4")
    checkpoint = calibrate(source, omni_data, tmp_path / "checkpoint", *quick)
    command = [sys.executable, "-m", "tests.engine.driver_speech", str(checkpoint), "Say hello.", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads((tmp_path / "out").read_text())
    sound = torch.tensor(found["samples"])
    assert "text" in found and sound.numel() > 0 and bool(sound.isfinite().all()) and float(sound.std()) > 0
