"""One record of each format becomes a conversation; a record that cannot be used is one line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from calibration.data.conversations import BadConversationError, Conversation, Media, PlainText, Text
from calibration.data.reading import Place
from calibration.data.records import read_record

# More brackets than json can nest.
DEEP = 100_000 * "["
SUM = {"type": "function", "function": {"name": "sum", "parameters": {}}}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A record at data.jsonl:7, beside files a.png, b.png, c.wav and d.mp4."""
    for name in ("a.png", "b.png", "c.wav", "d.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    return Place("data.jsonl:7", tmp_path, Counter())


def read(place: Place, record: Any) -> Conversation:
    found = read_record(place, record)
    assert isinstance(found, Conversation)
    return found


def turns(conversation: Conversation) -> list[tuple[Any, ...]]:
    """Role, then text or file name of each part."""
    return [
        (
            message.role,
            *(part.text if isinstance(part, Text) else Path(str(part.content)).name for part in message.parts),
        )
        for message in conversation.messages
    ]


def refusal(place: Place, record: Any) -> str:
    with pytest.raises(BadConversationError) as caught:
        read_record(place, record)
    message = str(caught.value)
    assert message.startswith("data.jsonl:7: ") and "\n" not in message
    return message


def user(content: Any, **further: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **further}


def test_media_beside_messages_take_the_places_of_their_marks(place: Place) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>first<audio> and <image>\nsecond"},
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": [{"type": "text", "text": "a film: <video>"}]},
        ],
        "images": ["a.png", {"path": "b.png", "bytes": None}],
        "audios": ["c.wav"],
        "videos": "d.mp4",
    }
    assert turns(read(place, record)) == [
        ("user", "a.png", "first", "c.wav", " and ", "b.png", "\nsecond"),
        ("assistant", "fine"),
        ("user", "a film: ", "d.mp4"),
    ]
    assert not place.unread


def test_parts_without_a_reference_take_the_next_medium(place: Place) -> None:
    content = [{"type": "image", "image": None, "text": None}, {"type": "text", "text": "?"}, {"image": "b.png"}]
    assert turns(read(place, user(content, images=["a.png"]))) == [("user", "a.png", "?", "b.png")]


def test_bytes_of_a_table_are_the_medium(place: Place) -> None:
    (message,) = read(place, user("<image>", image={"bytes": b"png", "path": "gone.png"})).messages
    assert message.parts == (Media("image", b"png", "data.jsonl:7: images"),)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (user("<image><image>", images=["a.png"]), "2 <image> marks and 1 image files beside the messages"),
        (user("none", images=["a.png", "b.png"]), "0 <image> marks and 2 image files"),
        (user("<image><audio>", images=["a.png"]), "1 <audio> marks and 0 audio files"),
        (user([{"type": "image"}]), "1 <image> marks and 0 image files"),
        (user("<video>", videos=[["a.png", "b.png"]]), "videos holds a list where one video belongs"),
        (user("<image>", images=[3]), "images names no image"),
        (user("<image>", images=["gone.png"]), "images file"),
        (user("<image>", images=["https://x.org/a.png"]), "images https://x.org/a.png is remote"),
    ],
)
def test_marks_and_media_that_do_not_fit(place: Place, record: Any, problem: str) -> None:
    assert problem in refusal(place, record)


def test_marks_without_lists_are_text_and_counted(place: Place) -> None:
    assert turns(read(place, user("draw <image> in SVG"))) == [("user", "draw <image> in SVG")]
    assert place.unread == {"<image> in a text, without images": 1}


def test_sharegpt_with_its_roles_system_and_tools(place: Place) -> None:
    record = {
        "system": "be brief",
        "tools": json.dumps([{"name": "sum", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "<image>1 + 2?"},
            {"from": "function_call", "value": '{"name": "sum", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three"},
        ],
        "image": "a.png",
    }
    conversation = read(place, record)
    assert turns(conversation) == [
        ("system", "be brief"),
        ("user", "a.png", "1 + 2?"),
        ("assistant", ""),
        ("tool", "3"),
        ("assistant", "three"),
    ]
    assert conversation.messages[2].fields == {
        "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}]
    }
    assert conversation.template == {"tools": [SUM]}


def test_alpaca_with_input_and_history(place: Place) -> None:
    record = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["hi", "ho"]]}
    assert turns(read(place, record)) == [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "ho"),
        ("user", "add\n1 2"),
        ("assistant", "3"),
    ]
    assert turns(read(place, {"query": "<image>?", "response": "", "images": ["a.png"]})) == [("user", "a.png", "?")]


def test_a_text_record_is_plain_text(place: Place) -> None:
    assert read_record(place, {"text": "rain", "id": 1}) == PlainText("data.jsonl:7", "rain")
    assert place.unread == {"id": 1}


def test_calls_reasoning_and_template_arguments_reach_the_template_as_in_vllm(place: Place) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    record = {
        "messages": [
            {"role": "user", "content": "1 + 2?", "name": "ann"},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {"role": "assistant", "content": "3", "tool_calls": []},
        ],
        "tools": [SUM],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    conversation = read(place, record)
    assert [message.fields for message in conversation.messages] == [
        {"name": "ann"},
        {
            "reasoning": "hm",
            "reasoning_content": "hm",
            "tool_calls": [{**call, "function": {"name": "sum", "arguments": {"a": 1}}}],
        },
        {"tool_call_id": "c1"},
        {},
    ]
    assert conversation.template == {"enable_thinking": False, "tools": [SUM]}
    assert not place.unread


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (user("x", tools="{"), "'tools' is not JSON"),
        (user("x", tools=DEEP), "'tools' is not JSON"),
        (user("x", tools=["sum"]), "'tools' is not a list of objects"),
        (user("x", chat_template_kwargs=[1]), "'chat_template_kwargs' is not an object"),
        (user("x", chat_template_kwargs={"tokenize": True}), "'chat_template_kwargs' holds 'tokenize'"),
        ({"conversations": [{"from": "function_call", "value": "sum"}]}, "the function_call message is not JSON"),
        ({"conversations": [{"from": "function_call", "value": DEEP}]}, "the function_call message is not JSON"),
        ({"conversations": {"from": "human"}}, "no messages"),
        ({"conversations": [{"value": "hi"}]}, "without a 'role'"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "'name' is not a string"),
        ({"messages": [{"role": "assistant", "tool_calls": "sum"}]}, "'tool_calls' is not a list"),
        ({"instruction": 3}, "a question or answer that is not text"),
        ({"instruction": "x", "history": ["hi"]}, "'history' is not a list of pairs"),
        ({"text": " "}, "'text' is empty"),
        ({"chosen": "x"}, "no 'messages'"),
        ("text", "no 'messages'"),
    ],
)
def test_a_record_that_cannot_be_used_is_one_line(place: Place, record: Any, problem: str) -> None:
    assert problem in refusal(place, record)
