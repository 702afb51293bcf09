"""Loads the user's calibration data from files: JSON lines, JSON, parquet and plain text."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calibration.data.conversations import BadConversationError, Conversation, PlainText, bad_conversations
from calibration.data.reading import SHOWN_CHARACTERS, Place
from calibration.data.records import READ_KEYS, read_record
from morphoquant_vllm.errors import MorphoQuantError

logger = logging.getLogger(__name__)

# Between two entries of an array.
_BETWEEN_ENTRIES = re.compile(r"[\s,]*")
# Rows of a table that are in memory as Python objects at once.
_ROWS = 64
_CONVERT = "convert it to .jsonl, for example by datasets.load_dataset(...)['train'].to_json('data.jsonl')"


def load_conversations(
    data: Path | str | Iterable[Path | str], *, skip_bad: bool = False
) -> list[Conversation | PlainText]:
    """Read calibration data from one or more paths, in the given order.

    A path is a file of records (.jsonl, .json, .parquet), a .txt file, or a directory of .txt files. Media files are
    checked to exist and base64 is decoded, but media are not decoded yet. With `skip_bad`, records that cannot be used
    are logged and left out.

    Raises MorphoQuantError, naming the file and line, for anything that is missing, empty or malformed. Without
    `skip_bad` the first few unusable records are named together.
    """
    paths = [data] if isinstance(data, Path | str) else list(data)
    if not paths:
        raise MorphoQuantError("no calibration data was given; pass at least one .jsonl or .txt file")
    bad: list[str] = []
    items = [item for path in paths for item in _load_path(Path(path), skip_bad, bad)]
    if bad and not skip_bad:
        raise bad_conversations(bad)
    return items


def _load_path(path: Path, skip_bad: bool, bad: list[str]) -> list[Conversation | PlainText]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
        if not files:
            raise MorphoQuantError(
                f"{path}: no .txt files in this directory; to use a .jsonl, name the file; to use a dataset, {_CONVERT}"
            )
        return [_load_text(file) for file in files]
    if not path.exists():
        raise MorphoQuantError(f"{path}: no such calibration data; give an existing .jsonl or .txt file")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [_load_text(path)]
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".parquet": _parquet,
    }
    if suffix not in readers:
        raise MorphoQuantError(
            f"{path}: unknown kind of calibration data {suffix or '(no suffix)'!r}; "
            f"use .jsonl, .json or .parquet (conversations) or .txt (plain text), or {_CONVERT}"
        )
    return _load_records(path, readers[suffix](path), skip_bad, bad)


def _load_records(
    path: Path, records: Iterator[tuple[str, Any]], skip_bad: bool, bad: list[str]
) -> list[Conversation | PlainText]:
    """The records of a file; reasons of unusable ones are added to `bad`, and keys that are not read are logged."""
    items: list[Conversation | PlainText] = []
    unread: Counter[str] = Counter()
    before = len(bad)
    for source, record in records:
        try:
            if isinstance(record, BadConversationError):
                raise record
            items.append(read_record(Place(source, path.parent, unread), record))
        except BadConversationError as error:
            bad.append(str(error))
            if skip_bad:
                logger.warning("skipped: %s", error)
    if unread:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(unread.items()))
        logger.warning("%s: not read, with the number of conversations: %s", path, names)
    skipped = len(bad) - before
    if skipped and not items and skip_bad:
        raise MorphoQuantError(f"{path}: none of its {skipped} conversations can be used; the first: {bad[before]}")
    if not items and not skipped:
        raise MorphoQuantError(f"{path}: no conversations; put one JSON object with 'messages' on each line")
    return items


def _read(path: Path) -> bytes:
    try:
        # A FIFO or a device may never end.
        if path.exists() and not path.is_file():
            raise MorphoQuantError(f"{path}: is not a regular file; give the data in one")
        return path.read_bytes()
    except OSError as error:
        raise MorphoQuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _decoded(path: Path, raw: bytes, encoding: str = "utf-8-sig") -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise MorphoQuantError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from error


def _load_text(path: Path) -> PlainText:
    text = _decoded(path, _read(path))
    if not text.strip():
        raise MorphoQuantError(f"{path}: the file is empty; give text to calibrate on")
    return PlainText(str(path), text)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Source and record of each line that is not blank; the record of a malformed line is its error."""
    for number, raw in enumerate(_read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            source = f"{path}:{number}"
            yield source, _json_line(source, raw)


def _json_line(source: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return BadConversationError(f"{source}: not UTF-8 text; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        return BadConversationError(f"{source}: {_problem(error)}")


def _problem(error: Exception, remedy: str = "write one JSON object per line") -> str:
    """Problem and remedy of an error of the JSON parser."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno}); {remedy}"
    if isinstance(error, RecursionError):
        return f"not JSON (nested too deep); {remedy}"
    # Python refuses to convert an integer of more than 4300 digits.
    return "holds a number with too many digits; write it as a string"


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Source and record of each entry of a JSON array; a file that begins with an object is read as JSON lines."""
    text = _decoded(path, _read(path))
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        yield from _one_or_lines(path, text)
        return
    yield from _entries(path, text, start + 1)


def _entries(path: Path, text: str, position: int) -> Iterator[tuple[str, Any]]:
    """Source and record of each entry of an array whose first entry may begin at `position`."""
    decoder, line, seen, entry = json.JSONDecoder(), 1, 0, 0
    while True:
        position = _BETWEEN_ENTRIES.match(text, position).end()  # type: ignore[union-attr]
        if text[position : position + 1] == "]":
            break
        line += text.count("\n", seen, position)
        seen, entry = position, entry + 1
        source = f"{path}:{line}, entry {entry}"
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # The end of the entry is unknown, so nothing after it can be read.
            raise MorphoQuantError(f"{source}: {_problem(error, 'write one JSON array of objects')}") from error
        yield source, record
    if text[position + 1 :].strip():
        raise MorphoQuantError(f"{path}: not JSON (text after the array); write one JSON array of objects")


def _one_or_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        yield f"{path}:1", json.loads(text)
    except (ValueError, RecursionError):
        yield from _json_lines(path)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Source and record of each row; nulls are dropped at every depth, since columns fill absent keys with null."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MorphoQuantError(
            f"{path}: reading parquet needs the package pyarrow; install it, or {_CONVERT}"
        ) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    source = f"{path}:row {number}"
                    cells = zip(batch.schema.names, batch.columns, strict=True)
                    yield source, _row(source, {name: column[index] for name, column in cells})
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
        raise MorphoQuantError(f"{path}: damaged or not parquet ({reason}); download it again") from error


def _row(source: str, cells: Mapping[str, Any]) -> Any:
    """The record of a table's row, whose cells are scalars of pyarrow; its error if one that counts has no value."""
    record = {}
    for name, cell in cells.items():
        try:
            record[name] = cell.as_py()
        # Dates beyond the year 9999, text that is not UTF-8, unknown time zones: errors of several kinds.
        except Exception as error:
            if name in READ_KEYS:
                reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
                return BadConversationError(f"{source}: {name!r} cannot be read ({reason}); write it as UTF-8 text")
            record[name] = True
    return _without_nulls(record)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
