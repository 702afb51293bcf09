"""The command on a tiny model: what it writes, resuming, and what bad input gets."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import job, methods
from benchmarks.accuracy.methods import METHODS, OMNI_ONLY, Peer, Simulated, choose, known_methods
from benchmarks.accuracy.reporting import report, summary
from benchmarks.common import corpus, texts
from morphoquant_vllm.errors import MorphoQuantError
from tests.tiny_models import build_tiny_llama


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run on a tiny model and short texts that need no download."""
    monkeypatch.setattr(corpus, "fetch", lambda directory: directory)
    for kind, names in (("EVALUATION", ("documentation", "code")), ("CALIBRATION", ("stdlib", "licence"))):
        whole = getattr(texts, kind)
        monkeypatch.setattr(texts, kind, {name: _beginning(whole[name]) for name in names})
    model = build_tiny_llama(tmp_path / "llama")
    settings = {"work": tmp_path / "work", "results": tmp_path / "results", "model": model}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["language", *flags, "--windows", "2", "--window-tokens", "32", "--calibration", "stdlib=2,licence=1"]


def _beginning(make: Callable[[Path], str]) -> Callable[[Path], str]:
    return lambda corpus: make(corpus)[:5000]


def _run(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", *line])
    command.main()


def test_runs_resumes_and_reports(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, line = tmp_path / "results", [*arguments, "--methods", "16bit,oracle-rtn-g64"]
    _run(monkeypatch, [*line, "--texts", "code"])
    first = json.loads((results / "language.json").read_text())
    assert set(first["methods"]) == {"16bit", "oracle-rtn-g64"}
    assert first["methods"]["oracle-rtn-g64"]["activations"]["kind"] == "bypass"
    assert "--methods" not in first["command"] and "--texts" not in first["command"]

    _run(monkeypatch, line)
    second = json.loads((results / "language.json").read_text())
    assert set(second["methods"]["16bit"]["texts"]) == {"code", "documentation"}
    assert second["methods"]["16bit"]["texts"]["code"] == first["methods"]["16bit"]["texts"]["code"]
    assert {path.name for path in results.iterdir()} == {"language.json", "language.md", "language.png"}

    # All is there: no model is loaded any more.
    monkeypatch.setattr(job.decoder, "load", None)
    _run(monkeypatch, line)
    monkeypatch.undo()
    capsys.readouterr()
    _run(monkeypatch, ["report", "--results", str(results)])
    assert "oracle-rtn-g64" in capsys.readouterr().out


def test_a_method_that_fails_does_not_stop_the_others(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = job.run

    def failing(work: job.Job, name: str, wanted: list[str]) -> None:
        if name == "oracle-rtn-g64":
            raise MorphoQuantError("no memory is left; close other programs")
        made(work, name, wanted)

    monkeypatch.setattr(job, "run", failing)
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, [*arguments, "--methods", "oracle-rtn-g64,16bit"])
    assert "oracle-rtn-g64: failed, as a line above says; the same command tries again" in str(ended.value)
    assert "1/2 oracle-rtn-g64: 0 s, failed: no memory is left; close other programs" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "results" / "language.json").read_text())["methods"]) == {"16bit"}


def test_results_of_other_settings_do_not_mix(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(monkeypatch, [*arguments, "--methods", "16bit,w4a16-gptq-g64"])
    changed = [*arguments, "--methods", "16bit", "--calibration", "stdlib=3"]
    _run(monkeypatch, changed)
    summary = json.loads((tmp_path / "results" / "language.json").read_text())
    # 16 bit does not depend on calibration data, GPTQ does and has not been run on these.
    assert set(summary["methods"]) == {"16bit"}


@pytest.fixture
def table(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The table of the tiny model alone."""
    whole = command.prepare
    monkeypatch.setattr(methods, "TABLE_MODELS", ("language",))
    changes = {"model": tmp_path / "llama", "windows": 2, "calibration": {"stdlib": 1}}
    monkeypatch.setattr(command, "prepare", lambda name, settings: whole(name, replace(settings, **changes)))
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    return ["table", *folders, "--window-tokens", "32"]


def test_the_table_runs_every_model_and_resumes(
    table: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, line = tmp_path / "results", table
    _run(monkeypatch, [*line, "--methods", "16bit,w4a16-rtn-g32"])
    assert "language 2/2 w4a16-rtn-g32" in capsys.readouterr().out
    found = json.loads((results / "overview.json").read_text())
    assert found["methods"]["16bit"]["language"]["against_16bit"]["ratio"] == 1
    assert found["methods"]["w4a16-rtn-g32"]["language"]["against_16bit"]["ratio"] != 1

    # All is there: no model is loaded any more.
    monkeypatch.setattr(job.decoder, "load", None)
    _run(monkeypatch, [*line, "--methods", "16bit"])
    assert list(json.loads((results / "overview.json").read_text())["methods"]) == ["16bit", "w4a16-rtn-g32"]


@pytest.fixture
def three_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """One method that every model has, one whose groups are wider than an input, and a peer."""
    few = {name: METHODS[name] for name in ("16bit", "w4a16-gptqmodel-g32")} | {"wide": Simulated("rtn", 256)}
    for module in (methods, job, summary):
        monkeypatch.setattr(module, "METHODS", few)
    monkeypatch.setattr(methods, "TABLE", tuple(few))


NOT_DIVISIBLE = "K = 128 of 0.self_attn.q_proj is not divisible by group size 256"
NO_PEER = "give --peer gptqmodel=PYTHON, the python of an environment with it"


def test_all_methods_are_those_that_the_model_can_have(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    three_methods: None,
) -> None:
    _run(monkeypatch, arguments)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        f"language: without w4a16-gptqmodel-g32: {NO_PEER}",
        f"language: without wide: {NOT_DIVISIBLE}",
    ]
    assert set(json.loads((tmp_path / "results" / "language.json").read_text())["methods"]) == {"16bit"}


def test_the_table_says_which_methods_a_model_cannot_have(
    table: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    three_methods: None,
) -> None:
    _run(monkeypatch, table)
    assert f"language: without wide: {NOT_DIVISIBLE}\n" in capsys.readouterr().out
    page = (tmp_path / "results" / "overview.md").read_text()
    assert "| 16bit | 1.000 ± 0.000 |  |\n" in page and "| wide | - |  |\n" in page
    assert f"- language, `wide`: {NOT_DIVISIBLE}\n" in page and f"`w4a16-gptqmodel-g32`: {NO_PEER}\n" in page
    with pytest.raises(SystemExit) as left:
        _run(monkeypatch, [*table, "--methods", "16bit,wide"])
    assert left.value.code == f"error: wide: language: {NOT_DIVISIBLE}"


@pytest.mark.parametrize(("name", "reason"), [("wide", NOT_DIVISIBLE), ("w4a16-gptqmodel-g32", NO_PEER)])
def test_a_named_method_that_the_model_cannot_have_ends_in_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    three_methods: None,
    name: str,
    reason: str,
) -> None:
    with pytest.raises(SystemExit) as left:
        _run(monkeypatch, [*arguments, "--methods", f"16bit,{name}"])
    assert left.value.code == f"error: {name}: {reason}"
    # Nothing ran before it.
    assert not (tmp_path / "results").exists() and not (tmp_path / "work" / "results").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--methods", "w3"], "error: unknown method 'w3'; known: 16bit, w4a16-rtn-g64,"),
        (["--texts", "x"], "error: unknown text 'x'; known: fiction, play, documentation, code"),
        (["--windows", "0"], "error: --windows 0: must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as left:
        _run(monkeypatch, ["language", *flags, "--work", str(tmp_path)])
    # sys.exit prints a string to stderr and ends with status 1.
    assert str(left.value.code).startswith(expected) and "\n" not in str(left.value.code)
    assert list(tmp_path.iterdir()) == []


def test_methods_of_modalities_belong_to_the_omni_benchmark() -> None:
    assert known_methods("omni") == [name for name, method in METHODS.items() if not isinstance(method, Peer)]
    assert set(known_methods("omni")) - set(known_methods("language")) == set(OMNI_ONLY) <= set(METHODS)


def test_choose() -> None:
    assert choose("method", None, METHODS) == list(METHODS)
    assert choose("method", ["served", "16bit", "served"], METHODS) == ["served", "16bit"]
    with pytest.raises(MorphoQuantError, match="no method is named"):
        choose("method", [], METHODS)


def test_report_without_results(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match="no results; run"):
        report.read(tmp_path)
