"""A cheaply calibrated checkpoint of a generated model loads in vLLM and answers; as at real size, in small."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.calibrate import __main__ as command
from benchmarks.calibrate.__main__ import main


def test_a_quick_calibration_that_was_cut_short_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, places = tmp_path / "checkpoint", list[str]()
    monkeypatch.setattr(sys, "argv", ["calibrate", "quick", str(model), "--output", str(checkpoint)])

    def stop(line: object) -> None:
        places.extend(sorted(path.name for path in tmp_path.iterdir()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "say", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main()
    assert places == ["checkpoint.data", "checkpoint.work"]
    capsys.readouterr()
    main()
    printed = capsys.readouterr().out
    assert "block 2/" in printed and "block 1/" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


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
