"""Texts of the demo."""

import json
from itertools import pairwise

import pytest

from benchmarks.demo import texts
from benchmarks.demo.__main__ import CHAT, QUESTION


@pytest.mark.parametrize("count", [1, 2, 5])
def test_excerpts_are_evenly_spaced(count: int) -> None:
    text = "".join(chr(0x4E00 + index) for index in range(1000))
    parts = texts.excerpts(text, count, 10).split("\n\n")
    starts = [text.index(part) for part in parts]
    assert [len(part) for part in parts] == [10] * count
    assert starts[0] == 0
    if count > 1:
        assert starts[-1] == 990
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1


def test_a_short_text_is_taken_whole() -> None:
    assert texts.excerpts("short", 3, 10) == "short"


def test_the_chats_that_calibrate_do_not_hold_the_answer() -> None:
    chats = [json.loads(line) for line in CHAT.read_text(encoding="utf-8").splitlines()]
    assert len(chats) == 16
    for chat in chats:
        assert [message["role"] for message in chat["messages"]][:2] == ["user", "assistant"]
    content = json.dumps(chats)
    assert QUESTION not in content
    assert "Paris" not in content and "France" not in content
