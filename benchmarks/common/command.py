"""Options and errors of every benchmark's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from morphoquant_vllm.errors import MorphoQuantError


def at_least_one(text: str) -> int:
    """An option's value that is a whole number above 0, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr and exit status 1 for a problem that the user can fix."""
    try:
        yield
    except (MorphoQuantError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: the Python package '{error.name}' is missing; run `make setup`")
