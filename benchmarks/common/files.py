"""Writes files atomically, and computes SHA-256 of values, files and code, which name kept results."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError


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


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends, and is removed if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_results(
    directory: Path, name: str, summary: Mapping[str, Any], markdown: str, png: bytes | None = None
) -> list[Path]:
    """Write NAME.json, NAME.md and, if there is a plot, NAME.png; return their paths."""
    contents: dict[str, str | bytes] = {"json": json.dumps(summary, indent=1) + "\n", "md": markdown}
    if png is not None:
        contents["png"] = png
    paths = [directory / f"{name}.{suffix}" for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomically(path, content)
    return paths


def read_result(directory: Path, name: str) -> dict[str, Any]:
    """NAME.json of `write_results`; MorphoQuantError if it is missing or damaged."""
    path = directory / f"{name}.json"
    if not path.is_file():
        raise MorphoQuantError(f"{path}: no such result; measure first, or name the directory and the result")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MorphoQuantError(f"{path}: not JSON ({error}); run the benchmark again") from error
    return found


def weight_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


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
    """SHA-256 of a file; `size` and `modified` are cache keys, so a changed file is read anew."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# Suffixes of files that decide what runs: Python, C++, and tables that the code reads.
_SOURCES = frozenset((".py", ".cpp", ".h", ".json"))


def code_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of sources (directories: all below). Of Python as it runs: comments and docstrings do not count."""
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return _total((file for file in found if file.suffix in _SOURCES), _source_digest)


def _source_digest(file: Path, size: int, modified: int) -> str:
    """By the file's kind; size and time as for `_content_digest`."""
    return (_syntax_digest if file.suffix == ".py" else _content_digest)(file, size, modified)


@cache
def _syntax_digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a module's syntax tree without docstrings; size and time as for `_content_digest`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
