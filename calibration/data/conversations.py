"""Reads the user's calibration data: JSONL conversations in OpenAI chat format, and plain text files."""

import base64
import binascii
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from morphoquant_vllm.errors import MorphoQuantError

logger = logging.getLogger(__name__)


class BadMediaError(MorphoQuantError):
    """A conversation's image, audio or video is missing or broken; --skip-bad leaves the conversation out."""


@dataclass(frozen=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True)
class Media:
    """An image, audio or video part of a message, not yet decoded.

    `kind` is "image", "audio" or "video"; `content` is a file or the encoded bytes; `name` is for messages.
    """

    kind: str
    content: Path | bytes
    name: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    parts: tuple[Text | Media, ...]


@dataclass(frozen=True)
class Conversation:
    """One conversation; `source` is "file:line"."""

    source: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PlainText:
    """A text file, to be cut into token windows without a chat template; `source` is the file."""

    source: str
    text: str


# Classes of load_conversations' result: the only ones that processes accept from each other when they broadcast it.
CLASSES = (Conversation, PlainText, Message, Text, Media, type(Path()))

# part type -> (key that holds its object, modality); OpenAI's types, and vLLM's audio_url and video_url.
_MEDIA_PARTS = {"image_url": "image", "audio_url": "audio", "video_url": "video", "input_audio": "audio"}
_PART_TYPES = ("text", *_MEDIA_PARTS)
_URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Characters of a path or URL that messages show.
SHOWN_CHARACTERS = 200
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def load_conversations(
    data: Path | str | Iterable[Path | str], *, skip_bad: bool = False
) -> list[Conversation | PlainText]:
    """Read calibration data from one or more paths, in the given order.

    A path is a .jsonl file (one conversation per line), a .txt file, or a directory of .txt files. Media files
    are checked to exist and base64 is decoded, but media are not decoded yet. With `skip_bad`, conversations whose
    media are missing are logged and left out.

    Raises MorphoQuantError, naming the file and line, for anything that is missing, empty or malformed.
    """
    paths = [data] if isinstance(data, Path | str) else list(data)
    if not paths:
        raise MorphoQuantError("no calibration data was given; pass at least one .jsonl or .txt file")
    return [item for path in paths for item in _load_path(Path(path), skip_bad)]


def _load_path(path: Path, skip_bad: bool) -> list[Conversation | PlainText]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
        if not files:
            raise MorphoQuantError(f"{path}: no .txt files in this directory; to use a .jsonl, name the file")
        return [_load_text(file) for file in files]
    if not path.exists():
        raise MorphoQuantError(f"{path}: no such calibration data; give an existing .jsonl or .txt file")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return list(_load_jsonl(path, skip_bad))
    if suffix == ".txt":
        return [_load_text(path)]
    raise MorphoQuantError(
        f"{path}: unknown kind of calibration data {suffix or '(no suffix)'!r}; "
        "use .jsonl (conversations in OpenAI chat format) or .txt (plain text)"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MorphoQuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _load_text(path: Path) -> PlainText:
    raw = _read(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise MorphoQuantError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from error
    if not text.strip():
        raise MorphoQuantError(f"{path}: the file is empty; give text to calibrate on")
    return PlainText(str(path), text)


def _load_jsonl(path: Path, skip_bad: bool) -> list[Conversation]:
    conversations, skipped = [], 0
    for number, raw in enumerate(_read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            conversations.append(_parse_line(f"{path}:{number}", raw, path.parent))
        except BadMediaError as error:
            if not skip_bad:
                raise
            logger.warning("skipped: %s", error)
            skipped += 1
    if skipped and not conversations:
        raise MorphoQuantError(f"{path}: the media of all its {skipped} conversations are broken; replace them")
    if not conversations:
        raise MorphoQuantError(f"{path}: no conversations; put one JSON object with 'messages' on each line")
    return conversations


def _parse_line(source: str, raw: bytes, folder: Path) -> Conversation:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MorphoQuantError(f"{source}: not UTF-8 text; convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg} at column {error.colno})"
        raise MorphoQuantError(f"{source}: {problem}; write one JSON object per line") from error
    except RecursionError as error:
        raise MorphoQuantError(f"{source}: not JSON (nested too deep); write one JSON object per line") from error
    except ValueError as error:
        # Python refuses to convert an integer of more than 4300 digits.
        raise MorphoQuantError(f"{source}: holds a number with too many digits; write it as a string") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        _refuse(source, "no 'messages'", 'write {"messages": [{"role": "user", "content": "..."}]}')
    return Conversation(source, tuple(_parse_message(source, message, folder) for message in messages))


def _parse_message(source: str, message: Any, folder: Path) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        _refuse(source, "a message without a 'role'", 'write {"role": "user", "content": "..."}')
    role, content = message["role"], message.get("content")
    if message.get("tool_calls"):
        _refuse(source, "'tool_calls' are not supported", "write the call out as text in 'content'")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        _refuse(source, f"the {role} message has no 'content'", "give it a string or a list of parts")
    return Message(role, tuple(_parse_part(source, part, folder) for part in content))


def _parse_part(source: str, part: Any, folder: Path) -> Text | Media:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return Text(_string(source, part, "text"))
    if not isinstance(kind, str) or kind not in _MEDIA_PARTS:
        _refuse(source, f"unknown part type {kind!r}", f"use one of {', '.join(_PART_TYPES)}")
    body = part.get(kind)
    if not isinstance(body, dict):
        wanted = '{"data": base64, "format": "wav"}' if kind == "input_audio" else '{"url": "..."}'
        _refuse(source, f"the {kind} part has no {kind!r} object", f"write it as {kind!r}: {wanted}")
    if kind == "input_audio":
        name = f"{source}: input_audio"
        return Media("audio", _decode_base64(source, kind, _string(source, body, "data")), name)
    return _resolve(source, kind, _string(source, body, "url"), folder)


def _resolve(source: str, kind: str, url: str, folder: Path) -> Media:
    """The media of a data: URL, a file:// URL or a path relative to the JSONL file."""
    modality = _MEDIA_PARTS[kind]
    if url[:5].lower() == "data:":
        header = _DATA_URL.match(url)
        if header is None:
            _refuse(source, f"the {kind} data: URL is not base64", "write data:<type>;base64,<data>")
        content = _decode_base64(source, kind, url[header.end() :])
        return Media(modality, content, f"{source}: {kind} data: URL")
    if url[:7].lower() == "file://":
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise MorphoQuantError(f"{source}: {_short(url)} is not a URL; use file:///absolute/path") from error
        if parts.netloc not in ("", "localhost"):
            _refuse(source, f"{_short(url)} names another machine", "use file:///absolute/path")
        path = Path(unquote(parts.path))
    elif _URL_SCHEME.match(url):
        _refuse(source, f"{kind} {_short(url)} is remote", "download it first and give its path")
    else:
        path = folder / url
    try:
        exists = path.is_file()
    except OSError as error:
        raise MorphoQuantError(
            f"{source}: {kind} file {_short(str(path))} cannot be looked up ({error.strerror}); "
            "give a path, or write base64 as data:<type>;base64,<data>"
        ) from error
    if not exists:
        raise BadMediaError(
            f"{source}: {kind} file {_short(str(path))} does not exist; paths are relative to the JSONL file "
            "(--skip-bad leaves such conversations out)"
        )
    return Media(modality, path, f"{source}: {path}")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _decode_base64(source: str, kind: str, data: str) -> bytes:
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadMediaError(f"{source}: bad base64 in {kind} ({error}); encode the file again") from error
    if not decoded:
        raise BadMediaError(f"{source}: empty base64 in {kind}; encode the file again")
    return decoded


def _string(source: str, body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or (key != "text" and not value):
        _refuse(source, f"a part without a {key!r} string", "see the part types of the OpenAI chat format")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        _refuse(source, f"{key!r} holds a NUL or half a surrogate pair", "write the text as valid Unicode")
    return value


def _refuse(source: str, problem: str, remedy: str) -> NoReturn:
    raise MorphoQuantError(f"{source}: {problem}; {remedy}")
