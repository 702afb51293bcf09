"""Processes that share a calibration, as torchrun starts them, but forks of this one: nothing is imported anew."""

import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from calibration.processes import Processes, open_processes
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.killing import kill_at

# A test of processes that wait for each other in vain fails, and does not hang.
TIMEOUT = timedelta(minutes=1)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def in_processes(
    directory: Path,
    work: Callable[[Processes], Any],
    count: int = 2,
    *,
    timeout: timedelta = TIMEOUT,
    kill: tuple[int, int] | None = None,
) -> list[Any]:
    """What `work` returns in each of `count` processes: a MorphoQuantError where it raised one, None if it was killed.

    `kill`, (rank, step), kills (SIGKILL) one of them before a step on the file system, see killing.
    """
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                _be(rank, count, port)
                with open_processes(timeout) as processes:
                    if kill is not None and kill[0] == rank:
                        kill_at(kill[1])
                    found = work(processes)
            except MorphoQuantError as error:
                found = error
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            (directory / f"result-{rank}").write_bytes(pickle.dumps(found))
            os._exit(0)
        children.append(child)
    results = []
    for rank, child in enumerate(children):
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            results.append(None)
        else:
            assert os.WEXITSTATUS(status) == 0, f"process {rank} failed: see its traceback"
            path = directory / f"result-{rank}"
            results.append(pickle.loads(path.read_bytes()))
            path.unlink()
    return results


def _be(rank: int, count: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def messages(results: Sequence[Any]) -> list[str]:
    """The error message of each process."""
    assert all(isinstance(result, MorphoQuantError) for result in results), results
    return [str(result) for result in results]
