"""A real `vllm serve` process for as long as a `with` block lasts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

POLL_SECONDS = 0.5
STOP_SECONDS = 20


class ServerError(RuntimeError):
    """The server did not come up; the message holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """The address of a running server, and its process."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def openai_url(self) -> str:
        """Base URL for the `openai` client."""
        return f"{self.url}/v1"


def until_parent_dies() -> list[str]:
    """Beginning of a command that gets SIGTERM when this process dies, even by SIGKILL; empty without setpriv."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _wait_until_healthy(server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(
                f"vllm serve exited with {server.process.returncode}; end of its log {server.log}:\n{_tail(server.log)}"
            )
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(POLL_SECONDS)
    raise ServerError(f"vllm serve did not answer within {timeout:.0f} s; end of its log:\n{_tail(server.log)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers: SIGTERM first, then SIGKILL."""
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # This also runs after a second Ctrl-C: no worker may outlive the block.
        _signal_group(process, signal.SIGKILL)
        process.wait(STOP_SECONDS)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise an exception in this process, so `serve` stops its server."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


@contextmanager
def serve(
    model: Path,
    log: Path,
    arguments: Sequence[str] = (),
    *,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Serve `model` on 127.0.0.1 with `vllm serve` and `arguments`; ServerError if it does not come up.

    The server is stopped when the block ends, also by an exception. Its output goes to `log`.
    """
    port = free_port()
    command = [
        *until_parent_dies(),
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **(environment or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", log, process)
            _wait_until_healthy(server, timeout)
            yield server
        finally:
            stop(process)
