"""A cheaply calibrated checkpoint of a generated model loads in vLLM and answers; as at real size, in small."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.calibrate.__main__ import main


@pytest.mark.full
def test_a_quick_checkpoint_is_served_and_answers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, results = tmp_path / "checkpoint", tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["calibrate", "quick", str(model), "--output", str(checkpoint)])
    main()
    places = ("--results", str(results), "--log", str(tmp_path / "serve.log"))
    monkeypatch.setattr(sys, "argv", ["calibrate", "serve", str(checkpoint), *places])
    main()
    result = json.loads((results / "serve.json").read_text())
    assert result["checkpoint"]["settings"]["rounding"] == "nearest"
    assert result["checkpoint"]["model"]["layout"] == "tiny"
    # 144 tokens of the image, 100 of the sound, and the question.
    assert result["prompt_tokens"] > 244 and result["answer_tokens"] == 8
    assert 0 < result["load_peak"]["anonymous"] <= result["peak"]["anonymous"]
    assert "rounding" in (results / "serve.md").read_text()
