"""One fact of the machine, its state and its remedy. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from morphoquant_vllm.errors import one_line

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: a subject, its state in words, and the remedy of a note or a problem."""

    subject: str
    state: State
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Finding:
    """A fact that needs no remedy."""
    return Finding(subject, "ok", text)


def note(subject: str, text: str, remedy: str = "") -> Finding:
    """A fact that limits some uses."""
    return Finding(subject, "note", text, remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """A fact that prevents serving."""
    return Finding(subject, "problem", text, remedy)


def guarded(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of `check`; one problem that names `subject` if it raises anything."""
    try:
        return list(check())
    except ModuleNotFoundError as error:
        return [problem(subject, f"the Python package '{error.name}' is missing", "install MorphoQuant again")]
    # Broad on purpose: a doctor reports a broken installation instead of ending with it.
    except Exception as error:
        words = one_line(f"{type(error).__name__}: {' '.join(str(error).split())}", 200)
        return [problem(subject, f"cannot be examined ({words})", "report this line as an issue")]
