"""The question to vLLM, which runs in a process of its own: its answers, and when it is skipped."""

import logging
import subprocess
from pathlib import Path

import pytest

from calibration.model import served_names
from calibration.model.served_names import check_names
from calibration.model.source import Source
from morphoquant_vllm import names
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

SOURCE = Source(Path("model"), {}, {})
SPEC = QuantizationSpec({"a": LayerSpec(32, 32, 32, "column", "a")})


def answer(monkeypatch: pytest.MonkeyPatch, status: int, out: str = "", err: str = "") -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, out, err))


def test_a_missing_layer_is_refused_by_the_commands_line(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, names.MISSING, err="Triton is installed\na: vLLM has no such linear\n")
    with pytest.raises(MorphoQuantError, match=r"^a: vLLM has no such linear$"):
        check_names(SOURCE, SPEC)


@pytest.mark.parametrize(
    ("status", "out", "err", "said"),
    [
        (0, "noise\nmodel: vLLM's X has all 1 layers\n", "", "model: vLLM's X has all 1 layers"),
        (names.NOT_BUILT, "", "model: vLLM cannot build it\n", "are not checked against vLLM: model: vLLM cannot"),
        (-9, "", "", "are not checked against vLLM: exit status -9"),
    ],
)
def test_other_answers_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int, out: str, err: str, said: str
) -> None:
    answer(monkeypatch, status, out, err)
    with caplog.at_level(logging.INFO):
        check_names(SOURCE, SPEC)
    assert said in caplog.text


def test_without_vllm_the_check_is_skipped_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(served_names.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("vLLM was asked"))
    with caplog.at_level(logging.INFO):
        check_names(SOURCE, SPEC)
    assert "not checked against vLLM, which is not installed" in caplog.text
