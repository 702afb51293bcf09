"""The gate on the divergence of two models, with tiny text models."""

from pathlib import Path

import pytest

from tests.examples.running import run
from tests.tiny_conversations import write_calibration_data
from tests.tiny_models import build_tiny_llama


def test_a_model_passes_beside_itself_and_fails_beside_a_stranger(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = build_tiny_llama(tmp_path / "first"), build_tiny_llama(tmp_path / "second", seed=1)
    data = ("--data", write_calibration_data(tmp_path / "data", "text"))
    run(monkeypatch, "compare_checkpoints.py", first, first, *data)
    assert "all      KL 0.0000  the same token 100.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: the KL divergence is above 0\.1 for all, text$"):
        run(monkeypatch, "compare_checkpoints.py", first, second, *data)
    run(monkeypatch, "compare_checkpoints.py", first, second, *data, "--most", "100")


def test_a_directory_without_a_model_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*none"):
        run(monkeypatch, "compare_checkpoints.py", tmp_path / "none", tmp_path / "none", "--data", tmp_path / "x.jsonl")
