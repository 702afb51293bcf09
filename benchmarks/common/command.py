"""Handling of errors in every benchmark's command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from morphoquant_vllm.errors import MorphoQuantError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr and exit status 1 for a problem that the user can fix."""
    try:
        yield
    except (MorphoQuantError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: the Python package '{error.name}' is missing; run `make setup`")
