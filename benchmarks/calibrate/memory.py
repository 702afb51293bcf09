"""Memory of a process and its children, watched from outside."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import psutil

INTERVAL_SECONDS = 0.1
# Looking for children costs more than asking known ones.
ROUNDS_BETWEEN_SEARCHES = 20


@dataclass(frozen=True)
class Peak:
    """Most bytes seen at once: resident in all, and without pages of files that the system can drop (mapped weights).

    Pages that processes share count in each of them.
    """

    resident: int = 0
    anonymous: int = 0

    def with_(self, other: Peak) -> Peak:
        """The larger of both, each for itself."""
        return Peak(max(self.resident, other.resident), max(self.anonymous, other.anonymous))


class MemoryWatch:
    """Samples memory as long as a `with` block lasts: of `pid` and its children, without one of this one's children."""

    def __init__(self, pid: int | None = None) -> None:
        self._process = psutil.Process(pid)
        self._own = [] if pid is None else [self._process]
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._since_taken = Peak()
        self.peak = Peak()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def take(self) -> Peak:
        """The peak since the last call."""
        with self._lock:
            taken, self._since_taken = self._since_taken, Peak()
        return taken

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        rounds, processes = 0, list(self._own)
        while not self._stopped.is_set():
            if rounds % ROUNDS_BETWEEN_SEARCHES == 0:
                processes = self._family()
            now = _memory(processes)
            with self._lock:
                self.peak, self._since_taken = self.peak.with_(now), self._since_taken.with_(now)
            rounds += 1
            self._stopped.wait(INTERVAL_SECONDS)

    def _family(self) -> list[psutil.Process]:
        try:
            return [*self._own, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _memory(processes: list[psutil.Process]) -> Peak:
    resident = anonymous = 0
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        resident += memory.rss
        # On Linux, `shared` counts pages of files and of shared memory.
        anonymous += memory.rss - memory.shared
    return Peak(resident, anonymous)
