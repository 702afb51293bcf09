"""Resolves references to media: paths, file: and data: URLs, and encoded bytes."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from calibration.data.conversations import BadConversationError, Media
from calibration.data.reading import Place, checked_text, present, short

_URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def find_media(place: Place, kind: str, name: str, reference: Any) -> Media:
    """The medium of a reference: a path or URL, encoded bytes, or an object with `bytes`, `path` or `url`.

    `kind` is "image", "audio" or "video", `name` the part or key for messages. Raises BadConversationError for a
    reference of another form, and for a file that is missing or remote.
    """
    if isinstance(reference, Mapping):
        given = present(reference)
        reference = next((given[key] for key in ("bytes", "path", "url") if given.get(key)), None)
    if isinstance(reference, bytes) and reference:
        return Media(kind, reference, f"{place.source}: {name}")
    if isinstance(reference, list):
        place.refuse(f"{name} holds a list where one {kind} belongs", f"give one {kind} file, not its frames or parts")
    if not isinstance(reference, str) or not reference:
        place.refuse(f"{name} names no {kind}", "give a path or a data: URL")
    return _of_url(place, kind, name, checked_text(place, name, reference))


def decode_base64(place: Place, name: str, data: str) -> bytes:
    """The bytes of base64 text; BadConversationError if there are none."""
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadConversationError(f"{place.source}: bad base64 in {name} ({error}); encode the file again") from error
    if not decoded:
        place.refuse(f"empty base64 in {name}", "encode the file again")
    return decoded


def _of_url(place: Place, kind: str, name: str, url: str) -> Media:
    if url[:5].lower() == "data:":
        header = _DATA_URL.match(url)
        if header is None:
            place.refuse(f"the {name} data: URL is not base64", "write data:<type>;base64,<data>")
        return Media(kind, decode_base64(place, name, url[header.end() :]), f"{place.source}: {name} data: URL")
    if url[:7].lower() == "file://":
        path = _of_file_url(place, url)
    elif _URL_SCHEME.match(url):
        place.refuse(f"{name} {short(url)} is remote", "download it first and give its path")
    else:
        path = place.folder / url
    try:
        exists = path.is_file()
    except OSError as error:
        raise BadConversationError(
            f"{place.source}: {name} file {short(str(path))} cannot be looked up ({error.strerror}); "
            "give a path, or write base64 as data:<type>;base64,<data>"
        ) from error
    if not exists:
        place.refuse(
            f"{name} file {short(str(path))} does not exist", "paths are relative to the folder of the data file"
        )
    return Media(kind, path, f"{place.source}: {path}")


def _of_file_url(place: Place, url: str) -> Path:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise BadConversationError(f"{place.source}: {short(url)} is not a URL; use file:///absolute/path") from error
    if parts.netloc not in ("", "localhost"):
        place.refuse(f"{short(url)} names another machine", "use file:///absolute/path")
    return Path(unquote(parts.path))
