"""Memory of a server's processes, as the kernel counts it (Linux)."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Lines of /proc/PID/status, in kB.
FIELDS = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon"}


def available() -> int:
    """Bytes that a new process may take without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def of_status(text: str) -> dict[str, int]:
    """Bytes by FIELDS of a /proc/PID/status; a kernel thread or a zombie has none."""
    found = {name: re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE) for name, field in FIELDS.items()}
    return {name: int(match[1]) * 1024 for name, match in found.items() if match}


def of_session(leader: int) -> dict[str, int]:
    """Bytes by FIELDS of the largest process of a session, by its anonymous memory: the engine, which has the weights.

    `leader` is the session's first process, as `subprocess.Popen(..., start_new_session=True)` starts it. Empty if
    no process is left. "peak" counts file pages too: weights that are mapped while they are read. "anonymous" does not.
    """
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            if os.getsid(int(directory.name)) == leader:
                found.append(of_status((directory / "status").read_text()))
        except (ProcessLookupError, FileNotFoundError):
            continue  # it has ended meanwhile
    return max(found, key=lambda one: one.get("anonymous", 0), default={})
