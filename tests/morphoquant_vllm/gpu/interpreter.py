"""A process of its own in which Triton interprets kernels on the CPU.

Triton decides when it is imported whether kernels are interpreted, and tests beside these import it to compile. So
the variable is set in one child only. Imports nothing that imports Triton.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def _become_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


class Interpreter:
    """Runs functions in the child; they must be importable by name."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_become_interpreter)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function` returns there, or raises."""
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()
