"""Texts for evaluation and other texts for calibration: installed everywhere, or fetched by `corpus`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

EVALUATION_MODULES = ("argparse", "tarfile", "statistics")
CALIBRATION_MODULES = (
    "asyncio.base_events",
    "csv",
    "difflib",
    "email.message",
    "http.client",
    "json.decoder",
    "logging",
    "pathlib",
    "subprocess",
)
LICENCE = Path(__file__).parents[2] / "LICENSE"
# Share of the topics of Python's reference manual, in alphabetical order, that is used for calibration.
CALIBRATION_SHARE = 0.75


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip() for part in parts)


def python_topics() -> tuple[str, str]:
    """Python's reference manual as pydoc ships it: (text to calibrate on, topics held back)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    cut = int(len(names) * CALIBRATION_SHARE)
    return _join(topics[name] for name in names[:cut]), _join(topics[name] for name in names[cut:])


def torch_documentation() -> str:
    """The docstrings of torch.nn's classes."""
    from torch import nn

    classes = [getattr(nn, name) for name in sorted(dir(nn)) if inspect.isclass(getattr(nn, name))]
    return _join(dict.fromkeys(inspect.getdoc(cls) or "" for cls in classes))


def _source(modules: Sequence[str]) -> str:
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)


def _numpy_documentation() -> str:
    """The docstrings of numpy's functions and classes."""
    import numpy

    members = [getattr(space, name) for space in (numpy, numpy.linalg, numpy.fft) for name in sorted(space.__all__)]
    return "\n\n".join(dict.fromkeys(inspect.getdoc(member) or "" for member in members if callable(member)))


def _book(name: str) -> Callable[[Path], str]:
    return lambda corpus: (corpus / name).read_text(encoding="latin-1").replace("\r\n", "\n")


# By name: the function that makes the text, given the directory of corpus.fetch.
EVALUATION: dict[str, Callable[[Path], str]] = {
    "fiction": _book("alice29.txt"),
    "play": _book("asyoulik.txt"),
    "documentation": lambda corpus: torch_documentation(),
    "code": lambda corpus: _source(EVALUATION_MODULES),
}
CALIBRATION: dict[str, Callable[[Path], str]] = {
    "python-topics": lambda corpus: python_topics()[0],
    "report": _book("lcet10.txt"),
    "poetry": _book("plrabn12.txt"),
    "numpy": lambda corpus: _numpy_documentation(),
    "stdlib": lambda corpus: _source(CALIBRATION_MODULES),
    "licence": lambda corpus: LICENCE.read_text(encoding="utf-8"),
}
# Windows of each; together 32.
CALIBRATION_WINDOWS = {"python-topics": 6, "report": 6, "poetry": 6, "numpy": 6, "stdlib": 6, "licence": 2}
