"""Times of the checks alone, compared with reading every tensor once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from morphoquant_vllm.format.checkpoint import check_headers, read_spec
from morphoquant_vllm.format.verify import verify_checkpoint


def read_tensors(directory: Path) -> None:
    """Read every tensor once, which every loader must do."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                # Mapped tensors are read when they are copied.
                file.get_tensor(name).clone()


CHECKS: dict[str, Callable[[Path], object]] = {
    "read every tensor": read_tensors,
    "check headers": lambda directory: check_headers(directory, read_spec(directory)),
    "verify without checksums": lambda directory: verify_checkpoint(directory, checksums=False),
    "verify": verify_checkpoint,
}


def drop_from_cache(directory: Path) -> None:
    """Ask the system to drop the weight files from its cache; the next read comes from the disk."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(directory: Path, rounds: int, *, cold: bool) -> dict[str, list[float]]:
    """Seconds of each check, once in every round; `cold`: from the disk, else from the system's cache."""
    found: dict[str, list[float]] = {name: [] for name in CHECKS}
    read_tensors(directory)
    for _ in range(rounds):
        for name, check in CHECKS.items():
            if cold:
                drop_from_cache(directory)
            started = time.perf_counter()
            check(directory)
            found[name].append(time.perf_counter() - started)
    return found
