"""Examples run as a user runs them, but in this process."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """Run a script of examples/ with these arguments."""
    path = EXAMPLES / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")
