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


@pytest.mark.skipif(not server.until_parent_dies(), reason="setpriv (util-linux) is not there")
def test_a_server_ends_when_the_benchmark_is_killed() -> None:
    code = (
        "import subprocess, sys, time; from benchmarks.common.server import until_parent_dies\n"
        "command = [*until_parent_dies(), sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True); time.sleep(60)"
    )
    process = start(code)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    # setpriv has to get as far as its request. Before it starts, the command is still that of the benchmark.
    deadline = time.monotonic() + 10
    while not _is_server(_command(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _is_server(command: str) -> bool:
    """Whether it is that of the server itself. While a process begins a program, its command is empty."""
    return "time.sleep" in command and not any(word in command for word in ("subprocess", "setpriv"))


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_free_ports_can_be_bound() -> None:
    assert 1024 <= server.free_port() < 65536
