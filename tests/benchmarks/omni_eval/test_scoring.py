"""What a response is worth."""

import pytest

from benchmarks.omni_eval.items import Item
from benchmarks.omni_eval.scoring import outcome, parse_choice
from benchmarks.omni_eval.summary import figures, summarise

CHOICES = {"A": "A tone", "B": "a word", "C": "noise", "D": "silence"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" (c) ", "C"),
        ("b.", "B"),
        ("B. a word", "B"),
        ("The best answer is: D", "D"),
        ("Answer: (A)", "A"),
        ("The answer is C because A and B are wrong.", "C"),
        ("I think it is (B), not noise.", "B"),
        ("Surely D", "D"),
        ("It is silence.", "D"),
        ("A tone", "A"),
        # Never guessed:
        ("", None),
        ("(A) or (B)", None),
        ("a word or noise", None),
        ("A dog barks.", None),
        ("E", None),
        ("I cannot tell", None),
        ("nothingness", None),
    ],
)
def test_choices(response: str, letter: str | None) -> None:
    assert parse_choice(response, CHOICES) == letter


def item(answers: tuple[str, ...], choices: dict[str, str] | None = None, **groups: str) -> Item:
    return Item("q", ("?",), choices or {}, answers, groups)


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [
        ("The height is 84 pixels", ("84",), "right"),
        ("It is 1,234.50.", ("1234.5",), "right"),
        ("3.14159", ("3.14",), "right"),
        ("840", ("84",), "wrong"),
        ("an Oak tree", ("oak",), "right"),
        ("soak", ("oak",), "wrong"),
        ("  ", ("oak",), "unparsed"),
    ],
)
def test_open_questions(response: str, answers: tuple[str, ...], expected: str) -> None:
    assert outcome(item(answers), response) == expected


def test_what_cannot_be_parsed_or_was_refused_is_not_right_and_is_counted() -> None:
    items = [
        Item(str(number), ("?",), CHOICES, ("B",), {"subject": subject, "modality": "text"})
        for number, subject in enumerate("xxyyy")
    ]
    found = summarise(items, {"0": "B", "1": "A", "2": "who knows", "3": None})
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
