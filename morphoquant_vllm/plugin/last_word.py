"""Repeats a worker's refusal in the last line of the log. vLLM says only "Engine core initialization failed" there.

The process that configures the engine learns from vLLM that a worker failed, but not why. So the worker writes its
line to a file. The configuring process prints it when it ends, after the traceback.
"""

from __future__ import annotations

import atexit
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError

# Longest line in bytes of UTF-8.
_LONGEST = 1 << 14


@dataclass(frozen=True)
class LastWord:
    """The file in which workers leave the line. Plain data: it goes to the workers with the configuration."""

    path: Path
    # Id of the process that prints the line.
    process: int

    @contextmanager
    def keep_refusal(self) -> Iterator[None]:
        """In a worker: write the MorphoQuantError raised inside to the file. Only the first refusal is kept."""
        try:
            yield
        except MorphoQuantError as error:
            if os.getpid() != self.process:
                # Without a writable folder, the line is only in the log above.
                with suppress(OSError):
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    with os.fdopen(os.open(self.path, flags, stat.S_IRUSR | stat.S_IWUSR), "wb") as file:
                        file.write(str(error).encode(errors="backslashreplace"))
            raise

    def print_refusal(self) -> None:
        """Print the line that a worker left, if any, and remove the file."""
        # A forked process inherits the exit handler.
        if os.getpid() != self.process:
            return
        with suppress(OSError):
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                if os.fstat(file.fileno()).st_uid != os.geteuid():
                    return
                line = file.read(_LONGEST).decode(errors="replace")
            self.path.unlink()
            print(f"MorphoQuantError: {line}", file=sys.stderr, flush=True)


def open_last_word() -> LastWord:
    """In the process that configures the engine: print the workers' refusal when this process ends."""
    # The name cannot be guessed. The file exists only if a worker refuses.
    path = Path(tempfile.gettempdir()) / f"morphoquant-{secrets.token_hex(16)}"
    word = LastWord(path, os.getpid())
    atexit.register(word.print_refusal)
    return word
