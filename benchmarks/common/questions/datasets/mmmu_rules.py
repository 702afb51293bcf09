"""MMMU's scoring rules: MMMU-Benchmark/MMMU, eval/eval_utils.py, commit 44b45b5. Pure.

Written anew from that file; tests hold them against lm-eval's copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

MARKS = ",.!?;:'"
# The answer in a line may begin after one of these; in the last line also after "=".
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# Decimals to which numbers must agree.
DECIMALS = 2
# From how many words on the text of a choice is looked for.
WORDS = 6
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def choice(response: str, choices: Mapping[str, str]) -> str | None:
    """The letter that a response chooses (parse_multi_choice_response); None if the authors' rule guesses at random.

    It is the last "(B)", else the last " B ", else, in more than five words, the choice whose text is named last.
    White space around the response is removed first: a server may send a newline that the authors' models did not.
    """
    text = response.strip()
    for mark in MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        found = _last({letter: text.rfind(form.format(letter)) for letter in choices})
        if found:
            return found
    if len(text.split()) < WORDS:
        return None
    return _last({letter: text.lower().rfind(part.lower()) for letter, part in choices.items()})


def _last(positions: Mapping[str, int]) -> str | None:
    letter = max(positions, key=lambda name: positions[name])
    return letter if positions[letter] >= 0 else None


def matches(response: str, answers: Iterable[str]) -> bool:
    """Whether an open question's response holds an accepted answer (parse_open_response and eval_open).

    It must hold a number equal to two decimals, or the accepted string in a passage that the rule takes for the answer.
    """
    wanted = [value for answer in answers for value in _normalised(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(text in found for text in texts) if isinstance(found, str) else found in wanted
        for found in _predictions(response)
    )


def _predictions(response: str) -> Iterator[str | float]:
    parts = _parts(response)
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    for text in (*parts, *numbers):
        yield from _normalised(text)


def _parts(response: str) -> list[str]:
    """The shortest end of every line that follows an indicator; the whole response if no line has one."""
    whole = response.strip().strip(".").lower()
    # The authors' pattern splits at sentences, too, but wants a capital there, after everything is in lower case.
    lines = whole.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for indicator in (*INDICATORS, "=") if number == len(lines) else INDICATORS:
            if indicator in line:
                end = line.rsplit(indicator, 1)[1].strip()
                if not shortest or len(end) < len(shortest):
                    shortest = end
        if shortest and not (len(shortest) == 1 and shortest in MARKS):
            found.append(shortest)
    return found or [whole]


def _normalised(text: str) -> list[str | float]:
    """A number rounded, or text in lower case; a single letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), DECIMALS)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
