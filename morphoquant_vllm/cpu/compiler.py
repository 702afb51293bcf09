"""The C++ compiler of the machine: finding it, and running it within a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

from morphoquant_vllm import environment

# Seconds after which a build is given up, waiting for another process's included.
BUILD_TIMEOUT = 120


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message names the reason and the remedy."""


class CompileError(BuildError):
    """The compiler ran and failed, as one that is too old for an instruction set does."""


def find_compiler() -> list[str]:
    """Command of the C++ compiler: the user's, else g++ or c++. Raises BuildError if there is none."""
    try:
        command = environment.compiler()
    except ValueError as error:
        raise BuildError(
            f"{environment.CXX} is not a command ({error}); set it to a C++ compiler, such as g++"
        ) from error
    for name in (command[0],) if command else ("g++", "c++"):
        if path := shutil.which(name):
            return [os.path.abspath(path), *command[1:]]
    raise BuildError(
        f"no C++ compiler ({command[0] if command else 'g++'}); install g++ or set {environment.CXX} to one"
    )


def run(command: Sequence[str], deadline: float) -> str:
    """Run a command until `deadline`, a time of `time.monotonic`; its output.

    Raises CompileError if it fails, BuildError if it cannot be started or does not end in time.
    """
    started = time.monotonic()
    try:
        # A new session: killing it also ends the compiler's child processes.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    # ValueError: a zero byte in the command.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BuildError(
            f"{command[0]} does not run ({reason}); install g++ or set {environment.CXX} to one"
        ) from error
    try:
        output, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"{command[0]} hangs ({time.monotonic() - started:.0f} s were not enough); set {environment.CXX} to g++"
        ) from error
    finally:
        _end(process)
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise CompileError(f"{command[0]} failed: {first}; g++ 11 or newer is known to work")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a command that still runs, with all that it started; never waits for its output.

    A child in a session of its own may hold the pipes open for ever.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
