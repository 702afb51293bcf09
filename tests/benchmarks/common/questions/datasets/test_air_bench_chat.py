"""The questions to a judge, and the scoring of its answers."""

from pathlib import Path

import pytest

from benchmarks.common.questions.datasets.air_bench_chat import CATEGORIES, figures, judgements, load, scores, summarise
from tests.benchmarks.common.questions.miniature import write_air_bench_chat


def test_a_judge_reads_both_answers_in_both_orders(tmp_path: Path) -> None:
    items = list(load(write_air_bench_chat(tmp_path)))
    asked = judgements(items, {"0": "A {low} tone.", "1": None})
    assert [item.id for item in asked] == ["0, reference first", "0, response first"]
    first, second = (str(item.parts[0]) for item in asked)
    assert first.startswith(
        "You are a helpful and precise assistant for checking the quality of the answer.\n"
        "[Detailed Audio Description]\nA tone of {200} Hz.\n[Question]\nWhat is heard in 0?\n"
        "[The Start of Assistant 1s Answer]\nA rising tone.\n[The End of Assistant 1s Answer]\n"
        "[The Start of Assistant 2s Answer]\nA {low} tone.\n[The End of Assistant 2s Answer]\n[System]\nWe would like"
    )
    assert "s Answer]\nA {low} tone.\n[The End of Assistant 1s Answer]" in second
    assert "s Answer]\nA rising tone.\n[The End of Assistant 2s Answer]" in second


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        ("8 4", (8, 4)),
        (" 10 0\n", (10, 0)),
        ("8, 4", None),
        ("11 4", None),
        ("8", None),
        ("8 4 since", None),
        ("-8 4", None),
        ("8.5 4", None),
        ("", None),
        (None, None),
    ],
)
def test_scores(judgement: str | None, expected: tuple[int, int] | None) -> None:
    assert scores(judgement) == expected


def test_the_average_is_that_of_four_kinds_of_audio(tmp_path: Path) -> None:
    items = list(load(write_air_bench_chat(tmp_path)))
    worth = {"speech": 2, "sound": 4, "music": 6, "speech_and_sound": 7, "speech_and_music": 9}
    judged = {}
    for number, task in enumerate(CATEGORIES):
        judged[f"{number}, reference first"] = f"10 {worth[CATEGORIES[task]]}"
        judged[f"{number}, response first"] = f"{worth[CATEGORIES[task]]} 10"
    found = summarise(items, {str(number): "x" for number in range(8)}, judged)
    assert found["average"] == (2 + 4 + 6 + (7 + 9) / 2) / 4
    assert found["by"]["subject"]["speech"] == {
        "judged": 2,
        "unparsed": 0,
        "refused": 0,
        "score": 2,
        "interval": [2, 2],
        "reference": 10,
    }
    judged["7, response first"] = "no idea"
    found = summarise(items, {str(number): "x" for number in range(8)}, judged)
    assert found["average"] is None, "a kind of audio without any judged answer"
    assert found["all"]["unparsed"] == 1


def test_the_interval_is_students() -> None:
    found = figures([(4.0, 9.0), (6.0, 9.0), (8.0, 9.0), None, "refused"])
    # t of 97.5 % with 2 degrees of freedom 4.302653; standard deviation 2.
    assert found["interval"] == pytest.approx([6 - 4.302653 * 2 / 3**0.5, 6 + 4.302653 * 2 / 3**0.5], abs=1e-5)
    assert (found["judged"], found["unparsed"], found["refused"]) == (3, 1, 1)
    assert figures([(4.0, 9.0)])["interval"] is None and figures([])["score"] is None
