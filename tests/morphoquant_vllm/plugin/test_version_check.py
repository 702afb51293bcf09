"""The comparison of an untested vLLM: made once, one line, and an error only if something needed is gone."""

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from morphoquant_vllm import compat, environment
from morphoquant_vllm.plugin import version_check

GONE = f"vllm.a:B is {compat.MISSING}, not (x)"
OTHER = "vllm.a:c is (x, y), not (x)"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> pytest.LogCaptureFixture:
    """Untested vLLM 9.9; the lines that are logged."""
    monkeypatch.setattr(compat, "installed_version", lambda: "9.9+cpu")
    monkeypatch.setenv(environment.CACHE.name, str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


def compare(monkeypatch: pytest.MonkeyPatch, *lines: str, status: int = 0) -> list[int]:
    """Let the comparison print `lines`; the list grows with each one that is made."""
    made: list[int] = []

    def run(command: object, **_: object) -> subprocess.CompletedProcess[str]:
        made.append(1)
        return subprocess.CompletedProcess((), status, "".join(f"{line}\n" for line in lines), "")

    monkeypatch.setattr(version_check.subprocess, "run", run)
    return made


def test_a_version_is_compared_once_and_one_line_names_what_differs(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compare(monkeypatch, OTHER, "vLLM 9.9: 1 of 2", status=1)
    assert version_check.may_serve() and version_check.may_serve()
    assert len(made) == 1
    assert told.messages == [f"MorphoQuant: vLLM 9.9+cpu is not tested; it differs in 1 interfaces: {OTHER}"] * 2


def test_equal_interfaces_are_said_to_be_equal(told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, "vLLM 9.9: 2 of 2")
    assert version_check.may_serve()
    (line,) = told.messages
    assert "is not tested; all interfaces that the plugin uses are as in 0.32.0" in line


def test_a_missing_interface_is_an_error(told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, GONE, OTHER, "vLLM 9.9: 0 of 2", status=1)
    assert not version_check.may_serve()
    assert told.messages == [
        f"MorphoQuant: vLLM 9.9+cpu lacks 1 needed interfaces ({GONE}); install one of 0.30.0, 0.31.0, 0.32.0"
    ]


def test_a_comparison_that_fails_is_said_and_made_again(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compare(monkeypatch, "", status=-9)
    assert version_check.may_serve() and version_check.may_serve()
    assert len(made) == 2 and all("could not be compared" in line for line in told.messages)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", OTHER.encode(), b"end\n" + OTHER.encode()])
def test_a_kept_comparison_that_is_not_whole_is_made_again(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    made = compare(monkeypatch, OTHER, "vLLM 9.9: 1 of 2", status=1)
    assert version_check.may_serve()
    (kept,) = (tmp_path / "cache" / "compared").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert version_check.may_serve() and len(made) == 2 and kept.read_bytes() == whole
    assert all(OTHER in line for line in told.messages)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_in_the_cache_neither_hangs_nor_leaves_more(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    made = compare(monkeypatch, "vLLM 9.9: 2 of 2")
    assert version_check.may_serve()
    (kept,) = (environment.cache_directory() / "compared").iterdir()
    kept.unlink()
    make(kept)
    assert version_check.may_serve() and len(made) == 2
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_tested_versions_and_workers_compare_nothing(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compare(monkeypatch, GONE, "vLLM 9.9: 0 of 1", status=1)
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    assert version_check.may_serve()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    monkeypatch.setattr(compat, "installed_version", lambda: "0.32.0+cpu")
    assert version_check.may_serve() and not made and not told.messages


def test_the_command_that_compares_is_the_documented_one() -> None:
    assert (sys.executable, "-m", "morphoquant_vllm.compat") == version_check.COMPARE


def test_an_interface_that_is_gone_is_described_by_the_word_that_makes_it_an_error() -> None:
    (line,) = compat.differences({"vllm.nowhere:name": "(x)"})
    assert f" is {compat.MISSING}" in line
