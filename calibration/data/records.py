"""Reads one record of the user's data: OpenAI messages, ShareGPT, alpaca, query and response, or a plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from calibration.data.conversations import Conversation, PlainText
from calibration.data.messages import KINDS, read_messages
from calibration.data.reading import Place, checked_text, present

# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# Arguments of chat templates that would change more than the text; vLLM refuses the first two as well.
_REFUSED_ARGUMENTS = ("chat_template", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "messages")

# Keys of a record that are read.
READ_KEYS = frozenset(
    (
        *("messages", "conversations", "conversation", "text", "system", "tools", "chat_template_kwargs"),
        *("instruction", "query", "input", "output", "response", "history"),
        *(key for kind in KINDS for key in (f"{kind}s", kind)),
    )
)


def read_record(place: Place, record: Any) -> Conversation | PlainText:
    """The conversation or text of a record, an object of JSON or of a table's row.

    Keys that are not read are counted by name. Raises BadConversationError, naming the place, for another form.
    """
    given = present(record) if isinstance(record, dict) else {}
    messages = _take_messages(place, given)
    if messages is None:
        if not isinstance(given.get("text"), str):
            place.refuse("no 'messages'", 'write {"messages": [{"role": "user", "content": "..."}]}')
        text = checked_text(place, "text", given.pop("text"))
        place.count_unread("", given)
        if not text.strip():
            place.refuse("'text' is empty", "remove it")
        return PlainText(place.source, text)
    system = given.pop("system", None)
    if system and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    template = _template_arguments(place, given)
    media = _take_media(place, given)
    place.count_unread("", given)
    return Conversation(place.source, read_messages(place, messages, media), template)


def _take_messages(place: Place, given: dict[str, Any]) -> Any:
    """The messages in OpenAI's form; the keys that hold them are removed from `given`. None: there are none."""
    for key in ("messages", "conversations", "conversation"):
        if key in given:
            messages = given.pop(key)
            return [_from_share_gpt(message) for message in messages] if isinstance(messages, list) else []
    if "instruction" in given or "query" in given:
        return _take_question(place, given)
    return None


def _from_share_gpt(message: Any) -> Any:
    """A message of ShareGPT (`from`, `value`) in OpenAI's form; any other message as it is."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    sender = message["from"]
    further = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**further, "role": _ROLES.get(sender, sender) if isinstance(sender, str) else None,
            "content": message.get("value")}  # fmt: skip


def _take_question(place: Place, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of alpaca (instruction, input, output, history), and of ms-swift's query and response."""
    asked = [given.pop(key) for key in ("instruction", "query", "input") if key in given]
    answer = next((given.pop(key) for key in ("output", "response") if key in given), "")
    turns = [*_history(place, given.pop("history", [])), ("\n".join(_texts(place, asked)), *_texts(place, [answer]))]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=False)
    ]


def _texts(place: Place, values: list[Any]) -> list[str]:
    """The values that are not empty; BadConversationError if one is not text."""
    if not all(isinstance(value, str) for value in values):
        place.refuse("a question or answer that is not text", "write instruction, input and output as strings")
    return [value for value in values if value]


def _history(place: Place, history: Any) -> list[tuple[str, str]]:
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        place.refuse("'history' is not a list of pairs", 'write [["question", "answer"]]')
    return [(question, answer) for question, answer in history]


def _take_media(place: Place, given: dict[str, Any]) -> dict[str, list[Any]]:
    """References of media by kind, from `images` or `image` and so on; only the kinds that are given."""
    media: dict[str, list[Any]] = {}
    for kind in KINDS:
        for key in (f"{kind}s", kind):
            if key in given and kind not in media:
                value = given.pop(key)
                media[kind] = value if isinstance(value, list) else [value]
    return media


def _template_arguments(place: Place, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template: `tools`, and the entries of `chat_template_kwargs`."""
    tools, arguments = (_parsed(place, given, key) for key in ("tools", "chat_template_kwargs"))
    if not isinstance(arguments or {}, Mapping):
        place.refuse("'chat_template_kwargs' is not an object", 'write {"enable_thinking": false}')
    refused = [key for key in _REFUSED_ARGUMENTS if key in (arguments or {})]
    if refused:
        place.refuse(f"'chat_template_kwargs' holds {refused[0]!r}", "give only variables of the template")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        place.refuse("'tools' is not a list of objects", 'write [{"type": "function", "function": {...}}]')
    # LLaMA-Factory writes the bare function.
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
    return {**(arguments or {}), **({"tools": wrapped} if wrapped else {})}


def _parsed(place: Place, given: dict[str, Any], key: str) -> Any:
    """The value of a key, which may be JSON in a string; removed from `given`."""
    value = given.pop(key, None)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        place.refuse(f"{key!r} is not JSON", "write it as an object, or as JSON in a string")
