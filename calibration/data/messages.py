"""Reads a record's messages: their parts, the media at their marks, and the keys that chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.data.conversations import Media, Message, Text
from calibration.data.media_references import decode_base64, find_media
from calibration.data.reading import Place, checked_text, present, short

KINDS = ("image", "audio", "video")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Part type that holds an object with a "url" -> modality: OpenAI's type, and vLLM's audio_url and video_url.
_URL_PARTS = {"image_url": "image", "audio_url": "audio", "video_url": "video"}
_PART_TYPES = ("text", *_URL_PARTS, "input_audio", *KINDS)
_MARK = re.compile(f"<({'|'.join(KINDS)})>")
# Keys of a message that vLLM gives to chat templates, by role ("": any role).
_TEMPLATE_KEYS = {
    "assistant": ("tool_calls", "reasoning", "reasoning_content"),
    "tool": ("tool_call_id",),
    "": ("name",),
}
# Roles of a call of a function and of its result in LLaMA-Factory and ms-swift.
_CALL_ROLES = ("function_call", "tool_call")
_RESULT_ROLES = {"observation": "tool", "tool_response": "tool"}


@dataclass(frozen=True)
class Mark:
    """The place of the next medium of a kind in a record's list of media."""

    kind: str


def read_messages(place: Place, messages: Any, media: Mapping[str, Sequence[Any]]) -> tuple[Message, ...]:
    """The messages of a record; `media` are references by kind, from the record's `images`, `audios`, `videos`.

    Raises BadConversationError if a message has another form, or if marks and media differ in number.
    """
    if not isinstance(messages, list) or not messages:
        place.refuse("no messages", 'write {"messages": [{"role": "user", "content": "..."}]}')
    drafts = [_read_message(place, message) for message in messages]
    parts = [list(_split_marks(place, draft, media)) for _, draft, _ in drafts]
    _check_marks(place, parts, media)
    left = {kind: iter(references) for kind, references in media.items()}
    return tuple(
        Message(role, tuple(_placed(place, part, left) for part in own), fields)
        for (role, _, fields), own in zip(drafts, parts, strict=True)
    )


def _read_message(place: Place, message: Any) -> tuple[str, list[Text | Media | Mark], dict[str, Any]]:
    """Role, parts and template keys of one message."""
    given = present(message) if isinstance(message, dict) else {}
    role = given.pop("role", None)
    if not isinstance(role, str):
        place.refuse("a message without a 'role'", 'write {"role": "user", "content": "..."}')
    content = given.pop("content", None)
    if role in _CALL_ROLES:
        role, content, given = "assistant", "", {**given, "tool_calls": _calls_of_text(place, role, content)}
    role = _RESULT_ROLES.get(role, role)
    fields = {key: given.pop(key) for key in (*_TEMPLATE_KEYS.get(role, ()), *_TEMPLATE_KEYS[""]) if key in given}
    place.count_unread("messages.", given)
    fields = _template_fields(place, fields)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if content is None and fields.keys() & {"tool_calls", "reasoning_content"}:
        return role, [], fields
    if not isinstance(content, list) or not content:
        place.refuse(f"the {short(role)} message has no 'content'", "give it a string or a list of parts")
    return role, [_read_part(place, part) for part in content], fields


def _template_fields(place: Place, fields: dict[str, Any]) -> dict[str, Any]:
    """The keys as vLLM gives them to templates: arguments of calls are objects, reasoning has both names."""
    reasoning = fields.get("reasoning", fields.get("reasoning_content"))
    if reasoning is not None:
        fields |= {"reasoning": reasoning, "reasoning_content": reasoning}
    for key in ("reasoning", "name", "tool_call_id"):
        if not isinstance(fields.get(key, ""), str):
            place.refuse(f"{key!r} is not a string", "write it as text, or remove it")
    calls = fields.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            place.refuse("'tool_calls' is not a list", 'write [{"type": "function", "function": {...}}]')
        fields["tool_calls"] = [_read_call(place, call) for call in calls]
    return fields


def _read_call(place: Place, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        place.refuse("a call in 'tool_calls' names no function", 'write {"function": {"name": ..., "arguments": {}}}')
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(arguments: Any) -> Any:
    """Arguments of a call as an object; JSON that is broken becomes {}, as in vLLM."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _calls_of_text(place: Place, role: str, content: Any) -> list[dict[str, Any]]:
    """The tool_calls of a message that holds calls as JSON: {"name": ..., "arguments": ...}, or a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        place.refuse(f"the {role} message is not JSON with a 'name'", 'write {"name": "f", "arguments": {...}}')
    return [{"type": "function", "function": call} for call in calls]


def _read_part(place: Place, part: Any) -> Text | Media | Mark:
    given = present(part) if isinstance(part, dict) else {}
    known = [key for key in _PART_TYPES if key in given]
    kind = given.pop("type", known[0] if len(known) == 1 else None)
    if kind in _TEXT_PARTS:
        text = given.pop("text", None)
        if not isinstance(text, str):
            place.refuse("a part without a 'text' string", "see the part types of the OpenAI chat format")
        found: Text | Media | Mark = Text(checked_text(place, "text", text))
    elif kind in KINDS:
        references = [given.pop(key) for key in (kind, "path", "url") if key in given]
        found = find_media(place, kind, kind, references[0]) if references else Mark(kind)
    elif isinstance(kind, str) and (kind in _URL_PARTS or kind == "input_audio"):
        found = _read_object(place, kind, given.pop(kind, None))
    else:
        place.refuse(f"unknown part type {short(repr(kind))}", f"use one of {', '.join(_PART_TYPES)}")
    place.count_unread("messages.content.", given)
    return found


def _read_object(place: Place, kind: str, body: Any) -> Media:
    """The medium of a part whose key `kind` holds an object."""
    key = "data" if kind == "input_audio" else "url"
    if not isinstance(body, dict):
        wanted = '{"data": base64, "format": "wav"}' if kind == "input_audio" else '{"url": "..."}'
        place.refuse(f"the {kind} part has no {kind!r} object", f"write it as {kind!r}: {wanted}")
    value = body.get(key)
    if not isinstance(value, str) or not value:
        place.refuse(f"a part without a {key!r} string", "see the part types of the OpenAI chat format")
    place.count_unread(f"messages.content.{kind}.", present(body).keys() - {key, "format"})
    if kind == "input_audio":
        return Media("audio", decode_base64(place, kind, value), f"{place.source}: input_audio")
    return find_media(place, _URL_PARTS[kind], kind, value)


def _split_marks(
    place: Place, parts: Sequence[Text | Media | Mark], media: Mapping[str, Sequence[Any]]
) -> Iterator[Text | Media | Mark]:
    """The parts, with texts cut at their marks. Without lists of media, marks are text and only counted."""
    for part in parts:
        if not isinstance(part, Text):
            yield part
        elif not media:
            place.unread.update({f"{mark[0]} in a text, without {mark[1]}s" for mark in _MARK.finditer(part.text)})
            yield part
        else:
            pieces = _MARK.split(part.text)
            for index, piece in enumerate(pieces):
                if index % 2:
                    yield Mark(piece)
                elif piece or len(pieces) == 1:
                    yield Text(piece)


def _check_marks(
    place: Place, parts: Sequence[Sequence[Text | Media | Mark]], media: Mapping[str, Sequence[Any]]
) -> None:
    for kind in KINDS:
        marks = sum(part == Mark(kind) for own in parts for part in own)
        count = len(media.get(kind, ()))
        if marks != count:
            place.refuse(
                f"there are {marks} <{kind}> marks and {count} {kind} files beside the messages",
                "write one mark for each file",
            )


def _placed(place: Place, part: Text | Media | Mark, left: Mapping[str, Iterator[Any]]) -> Text | Media:
    return find_media(place, part.kind, f"{part.kind}s", next(left[part.kind])) if isinstance(part, Mark) else part
