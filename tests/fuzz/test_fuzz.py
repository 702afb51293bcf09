"""Damaged checkpoints are refused in one line or harmless; and the fuzzer notices if they are not."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format import verify
from tests.fuzz.batches import findings
from tests.fuzz.examine import Finding, show
from tests.fuzz.intact import write_intact
from tests.fuzz.judge import Judge
from tests.fuzz.mutants import make_mutant

SEED = 18
# A quarter of a minute on one core; `make fuzz` tries 10,000.
SAMPLE = 600
FEW = 40


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "intact"
    write_intact(directory)
    return directory


def outcomes(intact: Path, count: int, hangs_after: float = 60.0) -> list[Finding]:
    return list(findings(intact, intact.with_name("mutant"), SEED, range(count), hangs_after))


def test_the_intact_checkpoint_is_harmless(intact: Path) -> None:
    verify.verify_checkpoint(intact)
    assert Judge(intact).fault(intact, resealed=False) is None


def test_a_number_makes_the_same_mutant_again(intact: Path, tmp_path: Path) -> None:
    for number in range(FEW):
        mutants = [make_mutant(intact, tmp_path / name, SEED, number) for name in "ab"]
        assert mutants[0] == mutants[1]


@pytest.mark.slow
def test_damage_is_refused_in_one_line_or_harmless(intact: Path) -> None:
    found = outcomes(intact, SAMPLE)
    assert len(found) == SAMPLE
    bad = [show(finding) for finding in found if not finding.good]
    assert not bad, "\n".join(bad)
    counts = {outcome: sum(finding.outcome == outcome for finding in found) for outcome in ("refused", "harmless")}
    # A fuzzer that damages nothing, or everything beyond recognition, finds nothing.
    assert min(counts.values()) > SAMPLE // 10


def test_without_hashes_damaged_weights_are_accepted_and_wrong(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_check_content", lambda *_: None)
    assert "accepted and wrong" in {finding.outcome for finding in outcomes(intact, 3 * FEW)}


def test_without_the_check_of_config_another_model_is_accepted(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "check_config", lambda *_: None)
    wrong = [finding for finding in outcomes(intact, 3 * FEW) if finding.outcome == "accepted and wrong"]
    assert any("config.json" in finding.detail for finding in wrong)


def _raise() -> None:
    raise ValueError("not for users")


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (_raise, "verify: ValueError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda: time.sleep(60), "hang"),
    ],
)
def test_each_fault_has_its_outcome_and_the_others_go_on(
    intact: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], outcome: str
) -> None:
    real, tried = verify.verify_checkpoint, intact.with_name(f"tried-{outcome[:4]}")

    def faulty(directory: Path) -> object:
        # A file counts: each mutant may have a process of its own.
        tried.write_text(f"{tried.read_text() if tried.exists() else ''}x")
        if len(tried.read_text()) == 3:
            fault()
        return real(directory)

    monkeypatch.setattr(verify, "verify_checkpoint", faulty)
    found = outcomes(intact, 5, hangs_after=5.0)
    assert [finding.outcome for finding in found if not finding.good] == [outcome]
    assert [finding.number for finding in found] == list(range(5)) and found[2].outcome == outcome


def test_an_error_of_two_lines_is_none(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path) -> None:
        error = MorphoQuantError("x")
        error.args = ("two\nlines",)
        raise error

    monkeypatch.setattr(verify, "verify_checkpoint", refuse)
    assert {finding.outcome for finding in outcomes(intact, 3)} == {"verify: no line"}
