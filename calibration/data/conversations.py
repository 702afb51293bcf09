"""The user's calibration data in memory: conversations of text and media, and plain texts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError

logger = logging.getLogger(__name__)

# Unusable conversations that are listed.
LISTED = 5


class BadConversationError(MorphoQuantError):
    """One conversation cannot be used; --skip-bad leaves it out."""


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
    """One turn of a conversation; `fields` are further keys that chat templates read, such as tool_calls."""

    role: str
    parts: tuple[Text | Media, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """One conversation; `source` is "file:line", `template` are arguments of the chat template, such as tools."""

    source: str
    messages: tuple[Message, ...]
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """A text file, to be cut into token windows without a chat template; `source` is the file."""

    source: str
    text: str


# Classes of load_conversations' result: the only ones that processes accept from each other when they broadcast it.
CLASSES = (Conversation, PlainText, Message, Text, Media, type(Path()))


def bad_conversations(reasons: Sequence[str], *, listed: bool = True) -> BadConversationError:
    """The error for unusable conversations; logs the first few reasons, each with its file and line, if `listed`."""
    if len(reasons) == 1:
        return BadConversationError(f"{reasons[0]} (--skip-bad leaves such conversations out)")
    for reason in reasons[:LISTED] if listed else ():
        logger.error("cannot be used: %s", reason)
    return BadConversationError(
        f"{len(reasons)} conversations cannot be used (the log lists the first {min(len(reasons), LISTED)}; "
        f"--skip-bad leaves them out); the first: {reasons[0]}"
    )
