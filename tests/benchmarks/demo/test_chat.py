"""The chats of the demo."""

import json

from benchmarks.demo.__main__ import CHAT, QUESTION


def test_the_chats_that_calibrate_do_not_hold_the_answer() -> None:
    chats = [json.loads(line) for line in CHAT.read_text(encoding="utf-8").splitlines()]
    assert len(chats) == 16
    for chat in chats:
        assert [message["role"] for message in chat["messages"]][:2] == ["user", "assistant"]
    content = json.dumps(chats)
    assert QUESTION not in content
    assert "Paris" not in content and "France" not in content
