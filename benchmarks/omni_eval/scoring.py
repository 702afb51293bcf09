"""From what a model said to right, wrong or not to be parsed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from benchmarks.omni_eval.items import Item

RIGHT, WRONG, UNPARSED, REFUSED = "right", "wrong", "unparsed", "refused"
# Decimals to which numbers of open questions must agree, as in MMMU's own evaluation.
DECIMALS = 2
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")


def outcome(item: Item, response: str | None) -> str:
    """What a response is worth; None stands for a request that the server refused."""
    if response is None:
        return REFUSED
    if item.choices:
        letter = parse_choice(response, item.choices)
        return UNPARSED if letter is None else RIGHT if letter in item.answers else WRONG
    return score_open(response, item.answers)


def parse_choice(response: str, choices: Mapping[str, str]) -> str | None:
    """The letter that a response chooses, or None.

    The order of MMMU's parse_multi_choice_response: a letter in brackets, a letter that stands alone, the text of a
    choice. Where that rule would guess at random, or take the last of several different letters, this returns None.
    """
    letters = "".join(choices)
    text = response.strip()
    alone = re.fullmatch(rf"[(\[]?([{letters}])[)\]]?[.:,;!]?", text, re.IGNORECASE)
    if alone:
        return alone[1].upper()
    # "A cat" and "I see" are no letters.
    no_word = r"(?!(?<=[AI])\s+[a-z])"
    stated = re.findall(rf"(?:answer|option|choice)(?: is|:)?\s*\(?([{letters}])\b{no_word}", text)
    bracketed = re.findall(rf"\(([{letters}])\)", text)
    leading = re.findall(rf"^([{letters}])[.:)]", text)
    standing = re.findall(rf"(?<![\w'])([{letters}])(?![\w']){no_word}", text)
    for found in (stated, leading, bracketed, standing):
        if found:
            return found[0] if len(set(found)) == 1 else None
    named = [letter for letter, choice in choices.items() if _holds(text, choice)]
    return named[0] if len(named) == 1 else None


def score_open(response: str, answers: Iterable[str]) -> str:
    """Of an open question: an accepted number among the response's, or an accepted string inside it."""
    text = response.strip()
    if not text:
        return UNPARSED
    for answer in answers:
        wanted = _number(answer)
        if wanted is not None:
            if any(_number(found) == wanted for found in _NUMBER.findall(text)):
                return RIGHT
        elif _holds(text, answer):
            return RIGHT
    return WRONG


def _holds(text: str, part: str) -> bool:
    part = part.strip().rstrip(".")
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text, re.IGNORECASE) is not None


def _number(text: str) -> float | None:
    try:
        return round(float(text.replace(",", "").strip()), DECIMALS)
    except ValueError:
        return None
