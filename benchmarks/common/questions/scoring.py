"""What a response is worth: right, wrong or not to be parsed. The rules themselves stand with their benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.common.questions.items import Item

RIGHT, WRONG, UNPARSED, REFUSED = "right", "wrong", "unparsed", "refused"

# What one benchmark's rule makes of a response to one of its questions: RIGHT, WRONG or UNPARSED.
Score = Callable[[Item, str], str]


def outcome(item: Item, response: str | None, score: Score) -> str:
    """What a response is worth; None stands for a request that the server refused."""
    return REFUSED if response is None else score(item, response)


def chosen(item: Item, letter: str | None) -> str:
    """What the letter that a rule found is worth; None where it found none."""
    return UNPARSED if letter is None else RIGHT if letter in item.answers else WRONG


def alone(text: str, position: int) -> bool:
    """Whether the letter at `position` is no part of a word: the A of "A." is, that of "Anyone" is not."""
    around = text[max(position - 1, 0) : position] + text[position + 1 : position + 2]
    return re.search(r"\w", around) is None
