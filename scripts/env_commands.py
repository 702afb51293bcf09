"""Commands that `make setup` runs in the environment, and the error that ends it.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path


class SetupError(Exception):
    """A step failed; the message is one line with the remedy, `details` the tail of what the command printed."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def run(command: list[str], lines: int) -> tuple[bool, str]:
    """Run a command silently from a neutral directory; return (succeeded, last lines of what it printed)."""
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode == 0, "\n".join(done.stdout.strip().splitlines()[-lines:])


def pip(python: Path, *arguments: str) -> None:
    """Run pip silently; raise SetupError carrying the tail of its output where it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", arguments[0], "-q", *arguments[1:]]
    succeeded, output = run(command, lines=25)
    if not succeeded:
        raise SetupError(f"pip {' '.join(arguments)} failed, see its output above; run make setup again", output)


def probe(python: Path, code: str) -> tuple[bool, str]:
    """Run Python code in the environment; return (succeeded, last line printed)."""
    return run([str(python), "-c", code], lines=1)


def installed_version(python: Path, distribution: str) -> str | None:
    """Return the version of a distribution of the environment, or None."""
    found, line = probe(python, f"import importlib.metadata as m; print(m.version({distribution!r}))")
    return line if found else None


def has_nvidia_gpu() -> bool:
    """Tell whether an NVIDIA driver answers on this machine."""
    command = shutil.which("nvidia-smi")
    return command is not None and run([command, "-L"], lines=1)[0]
