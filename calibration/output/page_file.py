"""A page that a user asks for: one file, whole or not at all, whose place is checked before the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError


def check_page(output: Path, *, overwrite: bool) -> None:
    """Raise MorphoQuantError if a page may not or cannot be written to `output`."""
    if output.is_dir():
        raise MorphoQuantError(f"{output}: is a directory; name a file with --output")
    if output.exists() and not overwrite:
        raise MorphoQuantError(f"{output}: exists; choose another --output, or pass --overwrite")
    with _partial(output) as partial:
        partial.touch()


def write_page(text: str, output: Path, *, overwrite: bool) -> None:
    """Write a page; MorphoQuantError as check_page, and if the disk is full."""
    check_page(output, overwrite=overwrite)
    with _partial(output) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A name beside the page; the file of that name does not stay."""
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        yield partial
    except OSError as error:
        raise MorphoQuantError(
            f"{output}: cannot be written ({error.strerror or error}); choose another --output"
        ) from error
    finally:
        # A name that cannot be written cannot be removed either.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
