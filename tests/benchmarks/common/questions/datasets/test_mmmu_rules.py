"""MMMU's rules and prompt against lm-eval's copy of the authors' code."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import lm_eval
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.common.questions.datasets.mmmu import prompt
from benchmarks.common.questions.datasets.mmmu_rules import choice, matches

CHOICES = {"A": "Oak", "B": "$6", "C": "a word", "D": "<image 1>"}
# Few pieces each, so orders and repetitions that tell the rules' steps apart are likely.
CHOOSING = ("(A)", "(C)", " A ", " B ", "oak", "$6", "a word", "x y ", ".", ",")
OPEN = ("so ", "is ", "= ", "84 ", "oak ", "x ", "-3.14159", "1,234", "2e-3", ".5", "\n", ". ", "T")


def texts(pieces: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=8).map("".join) | st.text(max_size=20)


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """lm_eval/tasks/mmmu/utils.py alone: its package brings the whole harness with it."""
    place = Path(str(lm_eval.__file__)).parent / "tasks" / "mmmu" / "utils.py"
    spec = importlib.util.spec_from_file_location("lm_eval_mmmu_utils", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(texts(CHOOSING))
@example("(A) (C) (A)")
@example(" A  B  A ")
@example("one two oak $6 three oak")
@settings(max_examples=200, deadline=None)
def test_choices_are_theirs_but_for_what_they_guess(theirs: ModuleType, response: str) -> None:
    guessed = []

    class Random:
        @staticmethod
        def choice(letters: list[str]) -> str:
            guessed.append(letters)
            return "guess"

    theirs.random = Random
    # Ours takes white space off first.
    expected = theirs.parse_multi_choice_response(response.strip(), list(CHOICES), CHOICES)
    assert choice(response, CHOICES) == (None if guessed else expected)


@given(texts(OPEN), st.lists(st.sampled_from(["84", "1234", "0.002", "-3.14", "oak", "x", "0.5"]), min_size=1))
@example("it is oak is x y", ["oak"])
@example("oak = 84", ["oak"])
@example("oak = 84\nT", ["oak"])
@example("-3.14159", ["-3.14"])
@settings(max_examples=200, deadline=None)
def test_open_questions_are_judged_as_theirs(theirs: ModuleType, response: str, answers: list[str]) -> None:
    expected = theirs.eval_open(answers, theirs.parse_open_response(response))
    assert matches(response, answers) == expected


def test_the_prompt_is_theirs_but_for_blank_lines(theirs: ModuleType) -> None:
    for kind, options in (("multiple-choice", CHOICES), ("open", {})):
        doc = {"question": "What is <image 1>?", "options": repr(list(options.values())), "question_type": kind}
        expected = re.sub(r"\n+", "\n", theirs._doc_to_text(doc))
        assert re.sub(r"\n+", "\n", prompt("What is <image 1>?", options)) == expected
    assert prompt("Why?", {"A": "x", "B": "y"}) == (
        "Why?\n(A) x\n(B) y\n\nAnswer with the option's letter from the given choices directly."
    )
