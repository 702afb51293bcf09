"""A refusal in a worker is said again in the last line; vLLM's own is "Engine core initialization failed".

vLLM tells the process that configures the engine that a worker failed, but not why. So the worker leaves its line in a
file, which that process prints when it ends, after the traceback.
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

# A line in UTF-8 is not longer.
_LONGEST = 1 << 14


@dataclass(frozen=True)
class LastWord:
    """Where workers leave the line; plain data that goes to them with the configuration."""

    path: Path
    # The process that prints it.
    process: int

    @contextmanager
    def told(self) -> Iterator[None]:
        """In a worker: what is refused here is kept for the last line. The first to be refused is heard."""
        try:
            yield
        except MorphoQuantError as error:
            if os.getpid() != self.process:
                # Without a folder to write to it stands in the log above, as everything else.
                with suppress(OSError):
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    with os.fdopen(os.open(self.path, flags, stat.S_IRUSR | stat.S_IWUSR), "wb") as file:
                        file.write(str(error).encode(errors="backslashreplace"))
            raise

    def say(self) -> None:
        """Print the line that a worker left, if any, and remove it."""
        # A forked process may end with what was registered here.
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
    """In the process that configures the engine: it prints what its workers leave when it ends."""
    # A name that nobody can guess; there is no file unless a worker refuses.
    path = Path(tempfile.gettempdir()) / f"morphoquant-{secrets.token_hex(16)}"
    word = LastWord(path, os.getpid())
    atexit.register(word.say)
    return word
