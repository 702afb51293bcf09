"""The order of the lines, a broken check, and the verdict."""

from collections.abc import Iterator

from morphoquant_vllm.doctor.examine import as_json, as_text, is_healthy
from morphoquant_vllm.doctor.finding import Finding, guarded, note, ok, problem


def test_a_note_does_not_prevent_serving_and_a_problem_does() -> None:
    healthy = [ok("cpu", "fine"), note("audio", "less", "install it")]
    assert is_healthy(healthy)
    assert as_text(healthy).splitlines() == [
        "ok       cpu    fine",
        "note     audio  less",
        "                -> install it",
        "this machine can serve",
    ]
    sick = [*healthy, problem("vllm", "absent", "install it")]
    assert not is_healthy(sick)
    assert as_text(sick).splitlines()[-1] == "1 problem"
    mendable = [*sick, problem("torchaudio", "old", "morphoquant doctor --mend makes it young")]
    assert as_text(mendable).splitlines()[-1] == "2 problems; begin with morphoquant doctor --mend"
    assert as_json(sick)["healthy"] is False
    assert as_json(sick)["findings"][2] == {
        "subject": "vllm",
        "state": "problem",
        "text": "absent",
        "remedy": "install it",
    }


def test_a_check_that_raises_is_one_line() -> None:
    def broken() -> Iterator[Finding]:
        yield ok("gpu", "lost")
        raise ValueError("two\nlines")

    (finding,) = guarded("gpu", broken)
    assert finding.state == "problem" and "ValueError: two lines" in finding.text
