"""What every benchmark's command line does with an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from morphoquant_vllm.errors import MorphoQuantError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend ends the program with one line on stderr and exit status 1."""
    try:
        yield
    except (MorphoQuantError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: the Python package '{error.name}' is missing; run `make setup`")
