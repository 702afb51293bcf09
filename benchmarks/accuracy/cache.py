"""Results on disk, one JSON file each, named by a hash of everything they depend on."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError

Key = Mapping[str, Any]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of names and contents of files (directories: the files directly inside)."""
    return _total(
        (file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()),
        _content_digest,
    )


def _total(files: Iterable[Path], digest_of: Callable[[Path, int, int], str]) -> str:
    total = hashlib.sha256()
    for file in sorted(files):
        state = file.stat()
        total.update(f"{file.name} {digest_of(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@cache
def _content_digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; size and time are there so that a changed file is read anew."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def code_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of Python sources (directories: all below) as they run: comments and docstrings do not count."""
    return _total(
        (file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])), _syntax_digest
    )


@cache
def _syntax_digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a module's syntax tree without docstrings; size and time as for `_content_digest`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class Cache:
    """A directory of results; `key` is a JSON object that names every setting a result depends on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, key: Key) -> Path:
        """File of the result of `key`, there or not."""
        return self.directory / f"{digest(key)[:32]}.json"

    def load(self, key: Key) -> dict[str, Any] | None:
        """The stored result, or None; MorphoQuantError where the file is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] != json.loads(json.dumps(key)):
                raise ValueError("it holds another key")
            result: dict[str, Any] = stored["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise MorphoQuantError(f"{path}: damaged result ({error}); delete it and run again") from error
        return result

    def store(self, key: Key, result: Mapping[str, Any]) -> None:
        """Write the result whole or not at all."""
        write_atomically(self.path(key), json.dumps({"key": key, "result": result}, indent=1) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either as before or complete, also when interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
