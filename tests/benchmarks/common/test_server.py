"""The helper that runs a server stops it, whatever it thinks of that."""

import signal
import subprocess
import sys
import time

import pytest

from benchmarks.common import server

# A process with a child, both deaf to SIGTERM, that says when it is ready.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
os.write(1, b"%d\\n" % os.getpid())
time.sleep(60)
"""


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)


def test_a_server_that_ends_when_asked_is_not_killed() -> None:
    process = start("import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline()
    server.stop(process)
    assert process.returncode == -signal.SIGTERM


def test_a_stubborn_server_and_its_workers_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STOP_SECONDS", 1)
    process = start(STUBBORN)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    server.stop(process)
    assert process.returncode == -signal.SIGKILL
    # The child is init's to reap once it is dead; until then it is a zombie, which runs nothing.
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_free_ports_can_be_bound() -> None:
    assert 1024 <= server.free_port() < 65536
