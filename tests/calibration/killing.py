"""Calibrations in a process of their own, killed (SIGKILL) at a chosen moment."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Steps of a process on the file system, by the names of Python's audit events.
STEPS = frozenset(("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"))


def in_child(work: Callable[[], object], *, at_step: int | None = None, after: float | None = None) -> bool:
    """Run `work` in a fork of this process; whether it ended by itself.

    It is killed before its `at_step`-th step on the file system's names and files (the first is 0), or `after` seconds.
    """
    child = os.fork()
    if child == 0:
        try:
            if at_step is not None:
                kill_at(at_step)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if after is not None:
        end = time.monotonic() + after
        while time.monotonic() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return _ended(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return _ended(os.waitpid(child, 0)[1])


def kill_at(step: int) -> None:
    """Kill this process before its `step`-th step on the file system from now on."""
    left = step

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        # Reading changes nothing: a kill before it is one before the next step.
        if event not in STEPS or (event == "open" and not _writes(arguments)):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(count)


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _ended(status: int) -> bool:
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the calibration failed: see its traceback"
    return True


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
