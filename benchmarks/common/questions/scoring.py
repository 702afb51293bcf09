"""Scores of responses: right, wrong or not parsed. The rules are in the modules of their benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.common.questions.items import Item

RIGHT, WRONG, UNPARSED, REFUSED = "right", "wrong", "unparsed", "refused"

# A benchmark's rule: scores a response to one of its questions as RIGHT, WRONG or UNPARSED.
Score = Callable[[Item, str], str]


def outcome(item: Item, response: str | None, score: Score) -> str:
    """The score of a response; None stands for a request that the server refused."""
    return REFUSED if response is None else score(item, response)


def chosen(item: Item, letter: str | None) -> str:
    """The score of a letter that a rule has found; None if it found none."""
    return UNPARSED if letter is None else RIGHT if letter in item.answers else WRONG


def alone(text: str, position: int) -> bool:
    """Whether the letter at `position` stands alone: the A of "A." does, that of "Anyone" does not."""
    around = text[max(position - 1, 0) : position] + text[position + 1 : position + 2]
    return re.search(r"\w", around) is None
