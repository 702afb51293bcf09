"""The place of one record in the user's files: names it in errors, and counts the keys that are not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from calibration.data.conversations import BadConversationError

# Characters of a path, URL or value that messages show.
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Place:
    """A record's place: `source` is "file:line", relative paths start at `folder`, `unread` counts keys and marks."""

    source: str
    folder: Path
    unread: Counter[str]

    def refuse(self, problem: str, remedy: str) -> NoReturn:
        """Raise BadConversationError with the record's source."""
        raise BadConversationError(f"{self.source}: {problem}; {remedy}")

    def count_unread(self, where: str, keys: Iterable[str]) -> None:
        """Count keys that are not read; `where` is the object that holds them, such as "messages.content."."""
        self.unread.update({f"{where}{key}" for key in keys})


def present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null: tables fill absent keys with null."""
    return {key: value for key, value in mapping.items() if value is not None}


def checked_text(place: Place, key: str, value: str) -> str:
    """The same text; BadConversationError if it is not valid Unicode."""
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        place.refuse(f"{key!r} holds a NUL or half a surrogate pair", "write the text as valid Unicode")
    return value


def short(text: str) -> str:
    """The text, cut for an error message."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
