"""Two thousand mixed requests at once: the server answers as before, and holds no more memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.common.server import Server, serve
from tests.engine.conftest import SERVER_ARGUMENTS
from tests.engine.soak import SHARES, Crowd, Memory, ask_all, soak

pytestmark = [pytest.mark.slow, pytest.mark.full]

REQUESTS = 2000
# Sent before memory is looked at, since allocators keep what the largest batches so far took: of 3.8 GiB they still
# gain 50 MiB between the 500th request and the 2000th, and 20 MiB in the 4000 after that.
WARM_UP = 1000
# More than ten times the time on two cores.
SECONDS = 600.0
MEBI = 2**20
# An image is 0.2 MiB as its tower takes it, and 300 come after the first quarter: kept, they would pass the bound, and
# so would 45 kB left by each of these 1500 requests.
MOST_GROWTH = 60 * MEBI


@dataclass
class Soaked:
    """A server's answers before and after the crowd, and its memory."""

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    crowd: Crowd
    memory: Memory
    server: Server


@pytest.fixture(scope="module")
def soaked(omni_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soaked]:
    directory = tmp_path_factory.mktemp("soak")
    with serve(omni_checkpoint, directory / "serve.log", SERVER_ARGUMENTS) as server:
        crowd = Crowd(f"{server.openai_url}/chat/completions", str(omni_checkpoint), directory)
        before = asyncio.run(ask_all(crowd, "before"))
        root = psutil.Process(server.process.pid)
        asyncio.run(soak(crowd, root, WARM_UP, SECONDS, seed=5))
        memory = asyncio.run(soak(crowd, root, REQUESTS, SECONDS))
        yield Soaked(before, asyncio.run(ask_all(crowd, "after")), crowd, memory, server)


def test_every_request_ends_as_its_kind_must(soaked: Soaked) -> None:
    for (kind, status), count in sorted(soaked.crowd.ends.items(), key=str):
        print(f"{kind}: {status}: {count}")
    print(f"sent twice: {soaked.crowd.resent}")
    assert soaked.crowd.ends.total() == WARM_UP + REQUESTS
    # Each time vLLM's log says why; see Crowd._send.
    text = soaked.server.log.read_text(errors="replace")
    assert soaked.crowd.resent <= text.count("Multi-modal cache miss")
    assert soaked.crowd.resent <= 0.01 * REQUESTS
    for kind in SHARES:
        found = {status for name, status in soaked.crowd.ends if name == kind}
        assert found, kind
        if kind == "cut off":
            assert found == {"left"}
        elif kind.startswith("bad"):
            assert all(isinstance(status, int) and 400 <= status < 500 for status in found), (kind, found)
        else:
            assert found == {200}, (kind, found)


def test_answers_are_the_same_before_and_after(soaked: Soaked) -> None:
    """To the last bit: each question is asked alone, so its numbers are summed in one order."""
    assert len(soaked.before) == 30 and len({tuple(answer["tokens"]) for answer in soaked.before}) == 30
    assert soaked.after == soaked.before


def test_no_process_grows_once_it_is_warm(soaked: Soaked) -> None:
    early, late = soaked.memory.between(0.25, 0.30), soaked.memory.between(0.90, 1.0)
    for pid, name in sorted(soaked.memory.names.items()):
        print(f"{name} {pid}: {early[pid] / MEBI:.1f} MiB after a quarter, {late[pid] / MEBI:.1f} MiB at the end")
    growth = sum(late.values()) - sum(early.values())
    print(f"the whole tree: {sum(early.values()) / MEBI:.1f} MiB, {growth / MEBI:+.1f} MiB by the end")
    assert len(early) >= 3, "the API server, the engine and its worker are processes of their own"
    assert growth < MOST_GROWTH
    assert max(late[pid] - early[pid] for pid in early) < MOST_GROWTH


def test_the_server_did_not_fail_and_says_nothing_of_ours(soaked: Soaked) -> None:
    assert soaked.server.process.poll() is None
    text = soaked.server.log.read_text(errors="replace")
    ours = [line for line in text.splitlines() if "morphoquant" in line.lower()]
    assert not [line for line in ours if "WARNING" in line or "ERROR" in line]
