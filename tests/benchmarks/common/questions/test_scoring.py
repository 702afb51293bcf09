"""The score of a response by each benchmark's rule."""

import pytest

from benchmarks.common.questions.datasets import air_bench, mmmu, scienceqa, video_mme
from benchmarks.common.questions.datasets.mmmu_rules import choice
from benchmarks.common.questions.items import Item
from benchmarks.common.questions.scoring import outcome
from benchmarks.common.questions.summary import figures, summarise

CHOICES = {"A": "A tone", "B": "a word", "C": "noise", "D": "silence"}


def item(answers: tuple[str, ...], choices: dict[str, str] | None = None, **groups: str) -> Item:
    return Item("q", ("?",), choices or {}, answers, groups)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "right"),
        (" b\n", "right"),
        ("B. a word", "right"),
        ("A.", "wrong"),
        ("a", "wrong"),
        # LLaVA's rule knows two forms only.
        ("(B)", "unparsed"),
        ("The answer is B.", "unparsed"),
        ("E", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_scienceqa(response: str, expected: str) -> None:
    assert scienceqa.score(item(("B",), CHOICES), response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "right"),
        ("B. a word", "right"),
        ("The best answer is: B", "right"),
        ("The best option is B.", "right"),
        # Not the B of "Best", which the authors' rule takes.
        ("Best option: B", "right"),
        ("Based on the video, B", "right"),
        ("(C)", "wrong"),
        ("A, not B", "wrong"),
        ("Cannot tell", "unparsed"),
        ("b", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_video_mme(response: str, expected: str) -> None:
    assert video_mme.score(item(("B",), CHOICES), response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "right"),
        ("B. a word", "right"),
        ("B\nsince it is spoken", "right"),
        ("The answer is B.", "right"),
        ("It must be (B)", "right"),
        ("A dog barks.", "wrong"),
        ("D", "wrong"),
        ("Anyone could tell", "unparsed"),
        ("a word", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_air_bench(response: str, expected: str) -> None:
    assert air_bench.score(item(("B",), CHOICES), response) == expected


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("B.", "B"),
        ("(A), no, (B)", "B"),
        ("A or B or (C) perhaps", "C"),
        ("I would say that it is silence", "D"),
        ("It is silence", None),
        ("", None),
    ],
)
def test_mmmu_choices(response: str, letter: str | None) -> None:
    assert choice(response, CHOICES) == letter


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [
        ("The height is 84 pixels", ("84",), "right"),
        ("It is 1,234.50.", ("1234.5",), "right"),
        ("3.14159", ("3.14",), "right"),
        ("840", ("84",), "wrong"),
        ("an Oak tree", ("oak",), "right"),
        ("so x = 3, thus the answer is 4", ("3",), "wrong"),
        ("so it is 3\nnothing", ("3",), "right"),
        ("  ", ("oak",), "unparsed"),
    ],
)
def test_mmmu_open_questions(response: str, answers: tuple[str, ...], expected: str) -> None:
    assert outcome(item(answers), response, mmmu.score) == expected


def test_what_cannot_be_parsed_or_was_refused_is_not_right_and_is_counted() -> None:
    items = [
        Item(str(number), ("?",), CHOICES, ("B",), {"subject": subject, "modality": "text"})
        for number, subject in enumerate("xxyyy")
    ]
    found = summarise(items, {"0": "B", "1": "A", "2": "who knows", "3": None}, scienceqa.score)
    assert found["questions"] == 5
    assert found["all"] | {"interval": None} == {
        "answered": 4,
        "right": 1,
        "wrong": 1,
        "unparsed": 1,
        "refused": 1,
        "accuracy": 0.25,
        "interval": None,
    }
    assert found["by"]["subject"]["x"]["accuracy"] == 0.5
    assert found["by"]["subject"]["y"]["accuracy"] == 0.0
    assert found["by"]["modality"]["text"]["answered"] == 4


def test_the_interval_is_wilsons() -> None:
    low, high = figures(["right"] * 8 + ["wrong"] * 2)["interval"]
    # (p + z²/2n -+ z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, n = 10, p = 0.8
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    assert figures([])["accuracy"] is None
